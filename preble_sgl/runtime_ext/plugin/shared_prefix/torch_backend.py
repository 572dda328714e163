"""SGLang's attention backend in plain torch, with shared prefixes read once; for the CPU.

Decode: what requests share is attended to once per stretch, what is a request's own by itself, and merged.
Extend: the cached prefix is attended to from the new tokens only, where the stock backend computes the
attention of the whole sequence again. What is not covered here goes the stock way, and is counted.
"""

from collections import Counter
from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from preble_sgl.runtime_ext.plugin.shared_prefix.covered import covers, uncovered_batch
from preble_sgl.runtime_ext.plugin.shared_prefix.groups import find_sharing, tokens_to_save
from preble_sgl.runtime_ext.plugin.shared_prefix.steps import Decode, Extend
from preble_sgl.runtime_ext.plugin.shared_prefix.watch import Watch

MIN_SAVED_VALUES = 1 << 18
"""Numbers of KV per layer that must be read less for a stretch to pay: so much a pass of its own costs."""


class SharedPrefixTorchBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """The stock backend but for attention over what is cached.

    `counts`: steps by what was done in them, and tokens of KV per layer that were read less.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        keys = model_runner.token_to_kv_pool.get_key_buffer(0)
        self._min_saved = tokens_to_save(MIN_SAVED_VALUES, 2 * keys[0].numel())
        self._watch = Watch(self._min_saved)
        self._decode: Decode | None = None
        self._step: Decode | Extend | None = None
        self.counts: Counter[str] = Counter()

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step: find what its requests share, once for all layers."""
        super().init_forward_metadata(forward_batch)
        self._step = None
        reason = uncovered_batch(forward_batch)
        if reason:
            self.counts[f"stock: {reason}"] += 1
        elif forward_batch.forward_mode.is_decode():
            self._step = self._decode_step(forward_batch)
        else:
            self._watch.after_prefill()
            self._step = self._extend_step(forward_batch)

    def _decode_step(self, batch: Any) -> Decode | None:
        lens = batch.seq_lens.tolist()
        sharing = self._watch.look(batch.rids, lens, lambda: self._rows(batch, max(lens)))
        self.counts["decode: shared" if sharing.stretches else "decode: nothing shared"] += 1
        self.counts["tokens saved"] += sharing.saved
        if not sharing.stretches:
            return None
        if self._decode is None or self._decode.sharing is not sharing:
            self._decode = Decode(sharing, lens)
        self._decode.step(self.req_to_token_pool.req_to_token, batch.req_pool_indices, batch.seq_lens)
        return self._decode

    def _extend_step(self, batch: Any) -> Extend:
        self.counts["extend"] += 1
        lens, prefix_lens = batch.seq_lens.tolist(), batch.extend_prefix_lens.tolist()
        rows = self._rows(batch, max(lens))
        sharing = find_sharing(rows, prefix_lens, self._min_saved)
        self.counts["tokens saved"] += sharing.saved
        return Extend(sharing, rows, prefix_lens, lens)

    def _rows(self, batch: Any, longest: int) -> Any:
        return self.req_to_token_pool.req_to_token[batch.req_pool_indices, :longest]

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
        if step is None or not covers(layer):
            return stock(q, k, v, layer, batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        out = step.attend(queries, keys, values, layer.scaling)
        return out.to(q.dtype).view(q.shape[0], -1)
