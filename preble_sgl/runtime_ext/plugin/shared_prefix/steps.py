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
    """Decode steps of the same requests: what each layer reads.

    `step` moves on to the next of them, in O(own tokens); all else is kept while the sharing is the same.
    """

    def __init__(self, sharing: Sharing, lens: list[int]) -> None:
        self.sharing = sharing
        self._shared = [(torch.tensor(one.members), one.slots.long()) for one in sharing.stretches]
        own_from = torch.tensor(sharing.own_from)
        self._groups = [(members, own_from[members, None]) for members in _alike(sharing.own_from, lens)]
        self._own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def step(self, table: torch.Tensor, requests: torch.Tensor, lens: torch.Tensor) -> None:
        """Read of each request what is its own by now. `table`: slots; `requests`: their rows in it."""
        self._own = [
            (members, *_own_slots(table, requests[members], starts, lens[members, None]))
            for members, starts in self._groups
        ]

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


def _alike(own_from: tuple[int, ...], lens: list[int]) -> list[torch.Tensor]:
    """Return the requests in groups whose own stretches are about as long."""
    own = {one: end - start for one, (start, end) in enumerate(zip(own_from, lens, strict=True))}
    groups: list[list[int]] = []
    for one in sorted(own, key=own.__getitem__, reverse=True):
        if groups and own[groups[-1][0]] <= WASTE * own[one] + 16:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [torch.tensor(group) for group in groups]


def _own_slots(
    table: torch.Tensor, requests: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the slots from `starts` to `ends`, padded, and -inf where they are; None if none had to be."""
    own_lens = ends - starts
    longest = int(own_lens.max())
    places = starts + torch.arange(longest)
    slots = table[requests[:, None], torch.minimum(places, ends - 1)].long()
    if bool((own_lens == longest).all()):
        return slots, None
    return slots, torch.zeros(places.shape).masked_fill_(places >= ends, float("-inf"))


class Extend:
    """One prefill step: its requests' new tokens, and the cached slots before them."""

    def __init__(self, sharing: Sharing, rows: torch.Tensor, prefix_lens: list[int], lens: list[int]) -> None:
        rows = rows.long()
        num_new = [end - start for start, end in zip(prefix_lens, lens, strict=True)]
        bounds = list(pairwise(accumulate(num_new, initial=0)))
        self._new = [slice(begin, end) for begin, end in bounds if end > begin]
        tokens = [torch.arange(begin, end) for begin, end in bounds]
        self._before = [
            (torch.cat([tokens[member] for member in one.members]), one.slots.long())
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
