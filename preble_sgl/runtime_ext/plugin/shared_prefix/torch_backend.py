"""SGLang's attention backend in plain torch, with shared prefixes read once; for the CPU.

Decode: what requests share is attended to once per stretch, what is a request's own by itself, and merged.
Extend: the cached prefix is attended to from the new tokens only, where the stock backend computes the
attention of the whole sequence again. What is not covered here goes the stock way, and is counted.
"""

from collections import Counter
from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing, find_sharing, still_holds
from preble_sgl.runtime_ext.plugin.shared_prefix.steps import Decode, Extend

COUNTS: Counter[str] = Counter()
"""Steps by what was done in them, and tokens of KV per layer that were read less."""
SETTLING_STEPS = 2
"""After a prefill, SGLang may still put requests on the slots of others that computed the same."""


class SharedPrefixTorchBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """The stock backend but for attention over what is cached."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._requests: list[int] = []
        self._sharing = Sharing((), ())
        self._settling = 0
        self._step: Decode | Extend | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step: find what its requests share, once for all layers."""
        super().init_forward_metadata(forward_batch)
        self._step = None
        reason = _uncovered_batch(forward_batch)
        if reason:
            COUNTS[f"stock: {reason}"] += 1
        elif forward_batch.forward_mode.is_decode():
            self._step = self._decode_step(forward_batch)
        else:
            self._settling = SETTLING_STEPS
            self._step = self._extend_step(forward_batch)

    def _decode_step(self, batch: Any) -> Decode | None:
        requests, lens = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
        rows = self.req_to_token_pool.req_to_token[batch.req_pool_indices, : max(lens)]
        known = requests == self._requests and not self._settling
        if not known or not still_holds(self._sharing, rows):
            self._sharing = find_sharing(rows, [one - 1 for one in lens])
            self._requests, self._settling = requests, max(0, self._settling - 1)
        COUNTS["decode: shared" if self._sharing.stretches else "decode: nothing shared"] += 1
        COUNTS["tokens saved"] += self._sharing.saved
        return Decode(self._sharing, rows, lens) if self._sharing.stretches else None

    def _extend_step(self, batch: Any) -> Extend:
        COUNTS["extend"] += 1
        lens, prefix_lens = batch.seq_lens.tolist(), batch.extend_prefix_lens.tolist()
        rows = self.req_to_token_pool.req_to_token[batch.req_pool_indices, : max(lens)]
        sharing = find_sharing(rows, prefix_lens)
        COUNTS["tokens saved"] += sharing.saved
        return Extend(sharing, rows, prefix_lens, lens)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        """Attend from one new token per request."""
        return self._forward(super().forward_decode, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        """Attend from the new tokens of each request."""
        return self._forward(super().forward_extend, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self, stock: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool
    ) -> Any:
        step = self._step
        if step is None or not _covers(layer):
            return stock(q, k, v, layer, batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        out = step.attend(queries, keys, values, layer.scaling)
        return out.to(q.dtype).view(q.shape[0], -1)


def _uncovered_batch(batch: Any) -> str | None:
    """Return why a batch has to go the stock way."""
    if batch.spec_info is not None:
        return "speculative decoding"
    if batch.encoder_lens is not None:
        return "encoder and decoder"
    return None if batch.forward_mode.name in ("DECODE", "EXTEND", "MIXED") else "another kind of step"


def _covers(layer: Any) -> bool:
    """Return whether a layer attends to all that is before a token."""
    has_window = layer.sliding_window_size is not None and layer.sliding_window_size > -1
    is_plain = layer.attn_type == AttentionType.DECODER and not layer.is_cross_attention
    return is_plain and not has_window and layer.qk_head_dim == layer.v_head_dim
