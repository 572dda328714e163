"""What is covered of SGLang's steps, layers and models; the rest goes the stock way."""

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention


def uncovered_batch(batch: Any) -> str | None:
    """Return why a step has to go the stock way."""
    if batch.spec_info is not None:
        return "speculative decoding"
    if batch.encoder_lens is not None:
        return "encoder and decoder"
    if batch.rids is None or batch.global_num_tokens_cpu is not None:
        return "requests of other ranks"
    return None if batch.forward_mode.name in ("DECODE", "EXTEND", "MIXED") else "another kind of step"


def covers(layer: Any) -> bool:
    """Return whether a layer attends to all that is before a token."""
    has_window = layer.sliding_window_size is not None and layer.sliding_window_size > -1
    is_plain = layer.attn_type == AttentionType.DECODER and not layer.is_cross_attention
    return is_plain and not has_window and layer.qk_head_dim == layer.v_head_dim


def uncovered_model(model: Any) -> str | None:
    """Return why no step of a model is covered by a backend that plans all layers as one."""
    layers = [one for one in model.modules() if isinstance(one, RadixAttention)]
    if not all(covers(layer) and not layer.logit_cap for layer in layers):
        return "layers with a window, a cap or a cross attention"
    shapes = {(one.tp_q_head_num, one.tp_k_head_num, one.qk_head_dim) for one in layers}
    return None if len(shapes) == 1 else "layers of different shapes"
