"""What a step of a runtime reads of its KV cache in each layer, worked out once for all layers."""

from itertools import accumulate, pairwise

import torch

from preble_sgl.runtime_ext.plugin.shared_prefix.attention import (
    Merged,
    attend_all,
    attend_causal,
    attend_each,
)
from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing

WASTE = 1.25
"""Own stretches are read together as long as padding them to the longest adds no more than this."""


class Decode:
    """One decode step: the slots to read in every layer."""

    def __init__(self, sharing: Sharing, rows: torch.Tensor, lens: list[int]) -> None:
        rows = rows.long()
        self._shared = [
            (torch.tensor(one.members), rows[one.members[0], one.start : one.end])
            for one in sharing.stretches
        ]
        self._own = [_padded(rows, sharing.own_from, lens, group) for group in _alike(sharing.own_from, lens)]

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention of a layer, (new tokens, heads, dim); `keys`, `values`: its whole KV cache."""
        merged = Merged(queries)
        for members, slots in self._shared:
            merged.add(members, *attend_all(queries[members], keys[slots], values[slots], scale))
        for members, slots, hidden in self._own:
            merged.add(members, *attend_each(queries[members], keys[slots], values[slots], scale, hidden))
        return merged.out


def _alike(own_from: tuple[int, ...], lens: list[int]) -> list[list[int]]:
    """Return the requests in groups whose own stretches are about as long."""
    own = {one: end - start for one, (start, end) in enumerate(zip(own_from, lens, strict=True))}
    groups: list[list[int]] = []
    for one in sorted(own, key=own.__getitem__, reverse=True):
        if groups and own[groups[-1][0]] <= WASTE * own[one] + 16:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _padded(
    rows: torch.Tensor, own_from: tuple[int, ...], lens: list[int], group: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a group's requests, the slots of what is their own, and -inf where one has none."""
    starts = torch.tensor([own_from[one] for one in group])[:, None]
    ends = torch.tensor([lens[one] for one in group])[:, None]
    members = torch.tensor(group)
    places = starts + torch.arange(int((ends - starts).max()))
    hidden = torch.zeros(places.shape).masked_fill_(places >= ends, float("-inf"))
    slots = rows[members[:, None], torch.minimum(places, ends - 1)]
    return members, slots, hidden


class Extend:
    """One prefill step: its requests' new tokens, and the cached slots before them."""

    def __init__(self, sharing: Sharing, rows: torch.Tensor, prefix_lens: list[int], lens: list[int]) -> None:
        rows = rows.long()
        num_new = [end - start for start, end in zip(prefix_lens, lens, strict=True)]
        bounds = list(pairwise(accumulate(num_new, initial=0)))
        self._new = [slice(begin, end) for begin, end in bounds if end > begin]
        tokens = [torch.arange(begin, end) for begin, end in bounds]
        self._before = [
            (torch.cat([tokens[member] for member in one.members]), rows[one.members[0], one.start : one.end])
            for one in sharing.stretches
        ] + [
            (tokens[one], rows[one, start:end])
            for one, (start, end) in enumerate(zip(sharing.own_from, prefix_lens, strict=True))
            if end > start
        ]
        self._slots = [rows[one, prefix_lens[one] : lens[one]] for one in range(len(lens)) if num_new[one]]

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention of a layer, (new tokens, heads, dim); `keys`, `values`: its whole KV cache."""
        merged = Merged(queries)
        for new, slots in zip(self._new, self._slots, strict=True):
            merged.add(new, *attend_causal(queries[new], keys[slots], values[slots], scale))
        for tokens, slots in self._before:
            merged.add(tokens, *attend_all(queries[tokens], keys[slots], values[slots], scale))
        return merged.out
