"""SGLang's FlashInfer backend with shared prefixes read once in decode steps; for GPUs, UNTESTED on one.

A step that shares enough is run without its CUDA graph, as the shape of its groups changes from step to step,
with `Cascade` in the place of the stock decode kernel. All else is stock. What a step has to save for that is
an estimate until it is measured: launching the kernels of a layer one by one takes the CPU about 0.3 ms, in
which an H100 reads 1 GB; and the kernels of a pass of its own take about 20 µs.
"""

from collections import Counter
from typing import Any

from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from sglang.srt.layers.attention.flashinfer_backend import (
    DecodeMetadata,
    FlashInferAttnBackend,
    _safe_merge_state,
)

from preble_sgl.runtime_ext.plugin.shared_prefix.cascade import Cascade, Shape
from preble_sgl.runtime_ext.plugin.shared_prefix.covered import uncovered_batch, uncovered_model
from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing, tokens_to_save
from preble_sgl.runtime_ext.plugin.shared_prefix.watch import Watch

MIN_STRETCH_BYTES = 1 << 26
"""Bytes of KV per layer that a stretch must save to pay for a pass of its own."""
MIN_STEP_BYTES = 1 << 30
"""Bytes of KV per layer that a step must save to pay for running without its CUDA graph."""


class SharedPrefixFlashInferBackend(FlashInferAttnBackend):  # type: ignore[misc]
    """The stock backend but for decode steps that share a prefix.

    `counts`: decode steps by what was done in them, and tokens of KV per layer that were read less.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        updater = self.indices_updater_decode
        self._shape = Shape(
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            updater.q_data_type,
            updater.data_type,
        )
        self._uncovered = self._uncovered_runtime(model_runner)
        self._watch = Watch(tokens_to_save(MIN_STRETCH_BYTES, self._shape.token_bytes))
        self._cascade = Cascade(
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer,
                "NHD",
                backend=self.decode_backend,
                use_tensor_cores=self.decode_use_tensor_cores,
            ),
            BatchPrefillWithPagedKVCacheWrapper(self.workspace_buffer, "NHD", backend=self.prefill_backend),
            _safe_merge_state,
            self._shape,
        )
        self.counts: Counter[str] = Counter()

    def goes_without_graph(self, forward_batch: Any) -> bool:
        """Return whether a decode step saves more than its CUDA graph does."""
        sharing = self._sharing(forward_batch)
        return sharing is not None and sharing.saved * self._shape.token_bytes >= MIN_STEP_BYTES

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step that runs without a CUDA graph."""
        self._note(forward_batch)
        is_decode = forward_batch.forward_mode.is_decode()
        sharing = self._sharing(forward_batch) if is_decode else None
        if sharing is not None and sharing.stretches and self._plan(sharing, forward_batch):
            self.counts["decode: shared"] += 1
            self.counts["tokens saved"] += sharing.saved
            self.forward_metadata = DecodeMetadata([self._cascade])
        else:
            super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Prepare a step that runs as a CUDA graph; all of it is stock."""
        self._note(forward_batch)
        super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)

    def _note(self, batch: Any) -> None:
        if not batch.forward_mode.is_decode():
            self._watch.after_prefill()

    def _plan(self, sharing: Sharing, batch: Any) -> bool:
        """Return whether the step is planned; a mistake here must not end the server."""
        table, lens = self.req_to_token_pool.req_to_token, batch.seq_lens_cpu.tolist()
        try:
            self._cascade.plan(sharing, table, batch.req_pool_indices, lens)
        except Exception as error:
            self._uncovered = f"{type(error).__name__}: {error}"
            return False
        return True

    def _sharing(self, batch: Any) -> Sharing | None:
        """Return what a decode step shares; None, and counted, where that is not covered."""
        reason = self._uncovered or uncovered_batch(batch)
        if reason or batch.seq_lens_cpu is None:
            self.counts[f"stock: {reason or 'lengths on the GPU alone'}"] += 1
            return None
        lens = batch.seq_lens_cpu.tolist()
        table = self.req_to_token_pool.req_to_token
        return self._watch.look(batch.rids, lens, lambda: table[batch.req_pool_indices, : max(lens)].cpu())

    def _uncovered_runtime(self, runner: Any) -> str | None:
        if self.dispatch_reason is not None or self.decode_uses_dequant_workspace:
            return "more than one kind of attention, or KV that is unpacked first"
        if getattr(getattr(self, "kv_index_translator", None), "reads_are_translated", False):
            return "slots that are translated"
        return uncovered_model(runner.model)
