"""One decode step of FlashInfer's kernels in two passes: over what requests share, and over their own KV.

Stands in for the decode wrapper that SGLang's FlashInfer backend calls in every layer. The first pass is a
prefill kernel in which the requests of a stretch are the queries of one sequence, so that its KV is read once
for all of them; the second is the stock decode kernel over what is left. Their states (output, log-sum-exp)
are merged exactly (https://docs.flashinfer.ai/tutorials/recursive_attention.html).

UNTESTED ON GPUs: the plans are tested against a float64 reference with kernels in torch, FlashInfer's own
kernels have not run it yet.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing, Stretch

Merge = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of every attention layer, per rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def planned(self) -> tuple[int, int, int, int]:
        """What FlashInfer's plans are told of it, and that a page is one slot."""
        return self.num_qo_heads, self.num_kv_heads, self.head_dim, 1

    @property
    def token_bytes(self) -> int:
        """Of the KV of a token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize


class Cascade:
    """The two passes of a step, planned once for all layers.

    `own`: a `BatchDecodeWithPagedKVCacheWrapper`; `shared`: a `BatchPrefillWithPagedKVCacheWrapper`; `merge`:
    FlashInfer's `merge_state`. KV is paged by single slots, as in SGLang's FlashInfer backend.
    """

    def __init__(self, own: Any, shared: Any, merge: Merge, shape: Shape) -> None:
        self._own, self._shared, self._merge, self._shape = own, shared, merge, shape
        self._planned: Sharing | None = None
        self._order = torch.empty(0, dtype=torch.long)
        self._levels: list[tuple[slice, torch.Tensor]] = []

    def plan(self, sharing: Sharing, table: torch.Tensor, requests: torch.Tensor, lens: list[int]) -> None:
        """Prepare a step. `table`: slots, (rows, positions); `requests`: their rows in it, on its device."""
        if sharing is not self._planned:
            self._plan_shared(sharing, table.device)
            self._planned = sharing
        self._plan_own(sharing, table, requests, lens)

    def forward(self, q: torch.Tensor, kv_cache: Any, **how: Any) -> torch.Tensor:
        """Return the attention of a layer, (requests, heads, dim), as SGLang asks FlashInfer for it."""
        out, lse = self._own.forward_return_lse(q, kv_cache, **how)
        parts, part_lses = self._shared.forward_return_lse(q[self._order], kv_cache, causal=False, **how)
        for queries, members in self._levels:
            out[members], lse[members] = self._merge(
                out[members], lse[members], parts[queries], part_lses[queries]
            )
        return out  # type: ignore[no-any-return]

    def _plan_shared(self, sharing: Sharing, device: torch.device) -> None:
        levels = levels_of(sharing)
        stretches = [one for level in levels for one in level]
        order = torch.tensor([member for one in stretches for member in one.members], device=device)
        ends = list(accumulate((sum(len(one.members) for one in level) for level in levels), initial=0))
        self._order = order
        self._levels = [(slice(start, end), order[start:end]) for start, end in pairwise(ends)]
        self._shared.begin_forward(
            _indptr(len(one.members) for one in stretches),
            _indptr(one.end - one.start for one in stretches),
            torch.cat([one.slots for one in stretches]).int(),
            torch.ones(len(stretches), dtype=torch.int32),
            *self._shape.planned,
            q_data_type=self._shape.q_dtype,
            kv_data_type=self._shape.kv_dtype,
        )

    def _plan_own(
        self, sharing: Sharing, table: torch.Tensor, requests: torch.Tensor, lens: list[int]
    ) -> None:
        own_lens = torch.tensor(lens) - torch.tensor(sharing.own_from)
        owners = torch.repeat_interleave(torch.arange(len(lens)), own_lens)
        places = torch.cat([torch.arange(*span) for span in zip(sharing.own_from, lens, strict=True)])
        slots = table[requests[owners.to(table.device)], places.to(table.device)]
        self._own.begin_forward(
            _indptr(own_lens.tolist()),
            slots.int(),
            torch.ones(len(lens), dtype=torch.int32),
            *self._shape.planned,
            q_data_type=self._shape.q_dtype,
            data_type=self._shape.kv_dtype,
        )


def levels_of(sharing: Sharing) -> list[list[Stretch]]:
    """Return the stretches such that those of one level have no request in common. O(members)."""
    num_before: Counter[int] = Counter()
    levels: list[list[Stretch]] = []
    for stretch in sharing.stretches:
        level = num_before[stretch.members[0]]
        levels[level:] = levels[level:] or [[]]
        levels[level].append(stretch)
        num_before.update(stretch.members)
    return levels


def _indptr(lens: Any) -> torch.Tensor:
    return torch.tensor(list(accumulate(lens, initial=0)), dtype=torch.int32)
