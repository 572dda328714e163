"""FlashInfer's paged attention and its merge in torch and float64, as its documentation says they work."""

from dataclasses import dataclass, field
from math import log
from typing import Any

import torch


def merge_state(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states, whose log-sum-exp is to base 2."""
    weights = torch.stack([lse, other_lse]).mul(log(2)).softmax(0).unsqueeze(-1)
    return weights[0] * out + weights[1] * other, torch.logaddexp2(lse, other_lse)


@dataclass
class PagedKernel:
    """A paged wrapper; without `begin_forward`'s first argument it is the one for decode steps."""

    is_decode: bool
    num_plans: int = 0
    planned: list[Any] = field(default_factory=list)

    def begin_forward(self, *args: Any, **dtypes: torch.dtype) -> None:
        """Check and keep a plan."""
        *indptrs, indices, last_page_len, qo_heads, kv_heads, dim, page_size = args
        num = len(last_page_len)
        if self.is_decode:
            indptrs = [torch.arange(num + 1, dtype=torch.int32), *indptrs]
        assert page_size == 1
        assert last_page_len.tolist() == [1] * num
        assert all(
            one.dtype == torch.int32 and len(one) == num + 1 and int(one.diff().min()) > 0 for one in indptrs
        )
        assert indices.dtype == torch.int32
        assert len(indices) == indptrs[1][-1]
        assert dtypes.keys() == {"q_data_type", "data_type" if self.is_decode else "kv_data_type"}
        self.num_plans += 1
        self.planned = [*(one.tolist() for one in indptrs), indices.long(), (qo_heads, kv_heads, dim)]

    def forward(
        self, q: torch.Tensor, kv_cache: tuple[torch.Tensor, torch.Tensor], *, sm_scale: float
    ) -> torch.Tensor:
        """Return the attention of each query."""
        return self.forward_return_lse(q, kv_cache, sm_scale=sm_scale)[0]

    def forward_return_lse(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        causal: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state of each query over the KV of its sequence."""
        queries, ends, indices, (heads, kv_heads, dim) = self.planned
        assert q.shape == (queries[-1], heads, dim)
        assert not causal
        out, lse = torch.empty(q.shape, dtype=torch.float64), torch.empty(q.shape[:2], dtype=torch.float64)
        for number in range(len(queries) - 1):
            rows = slice(queries[number], queries[number + 1])
            slots = indices[ends[number] : ends[number + 1]]
            keys, values = (
                one[slots].double().repeat_interleave(heads // kv_heads, dim=1) for one in kv_cache
            )
            scores = torch.einsum("qhd,khd->qhk", q[rows].double(), keys) * sm_scale
            out[rows] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)
            lse[rows] = scores.logsumexp(-1) / log(2)
        return out, lse
