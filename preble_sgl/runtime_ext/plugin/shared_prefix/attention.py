"""Attention over parts of the KV, and the exact merge of the parts.

Softmax over a whole is the sum of softmaxes over its parts, each weighted by the exponential of its
log-sum-exp (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; it is what FlashInfer's
`merge_state` computes).
Shapes: queries (tokens, heads, dim); keys and values (slots, KV heads, dim).
"""

from typing import TypeAlias

import torch

Index: TypeAlias = torch.Tensor | slice


class Merged:
    """Attention of each query over the parts that were added so far, in float32."""

    def __init__(self, queries: torch.Tensor) -> None:
        self._out = torch.zeros(queries.shape)
        self._lse = torch.full(queries.shape[:2], float("-inf"))

    def add(self, index: Index, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Add a part for the queries `index`: its `out`, and its `lse` of shape (tokens, heads)."""
        before = self._lse[index]
        total = torch.logaddexp(before, lse)
        weight = torch.exp(before - total).unsqueeze(-1)
        self._out[index] = torch.lerp(out, self._out[index], weight)
        self._lse[index] = total

    @property
    def out(self) -> torch.Tensor:
        """The attention over everything."""
        return self._out


def attend_all(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what queries see of KV that lies before all of them: (out, lse).

    Query heads of one KV head, and all queries, are rows of one matrix product, so KV is read once.
    """
    num, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    rows = (
        queries.view(num, kv_heads, heads // kv_heads, dim).permute(1, 0, 2, 3).reshape(1, kv_heads, -1, dim)
    )
    out, lse = _flash(rows, keys.permute(1, 0, 2)[None], values.permute(1, 0, 2)[None], scale)
    shape = (kv_heads, num, heads // kv_heads)
    return (
        out.view(*shape, -1).permute(1, 0, 2, 3).reshape(num, heads, -1),
        lse.view(shape).permute(1, 0, 2).reshape(num, heads),
    )


def attend_causal(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the tokens of one sequence see of each other: (out, lse)."""
    num, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    share = heads // kv_heads
    rows = queries.view(num, kv_heads, share, dim).permute(2, 1, 0, 3)
    keys, values = (one.permute(1, 0, 2)[None].expand(share, -1, -1, -1) for one in (keys, values))
    out, lse = _flash(rows, keys, values, scale, is_causal=True)
    return (
        out.permute(2, 1, 0, 3).reshape(num, heads, -1),
        lse.permute(2, 1, 0).reshape(num, heads),
    )


def attend_each(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one query each sees of KV of its own: (out, lse).

    `keys`, `values`: (queries, positions, KV heads, dim); `hidden`: (queries, positions), -inf where there is
    nothing, None if there is something everywhere.
    """
    num, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    rows = queries.view(num, kv_heads, heads // kv_heads, dim)
    mask = None if hidden is None else hidden[:, None, None, :]
    out, lse = _flash(rows, keys.transpose(1, 2), values.transpose(1, 2), scale, mask=mask)
    return out.reshape(num, heads, -1), lse.reshape(num, heads)


def _flash(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel behind torch's own attention on the CPU: alone it tells the log-sum-exp, too."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys.to(queries.dtype), values.to(queries.dtype), 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out.float(), lse
