"""What the FlashInfer backend decides; SGLang's and FlashInfer's parts are played by a few lines of torch."""

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runtime_ext.plugin.shared_prefix.torch_kernels import PagedKernel, merge_state

OURS = "preble_sgl.runtime_ext.plugin.shared_prefix"


class StockBackend:
    """What ours is made of."""

    def __init__(self, runner: Any, init_new_workspace: bool) -> None:
        self.indices_updater_decode = SimpleNamespace(
            num_qo_heads=32,
            num_kv_heads=8,
            head_dim=128,
            q_data_type=torch.bfloat16,
            data_type=torch.bfloat16,
        )
        self.req_to_token_pool = runner.req_to_token_pool
        self.workspace_buffer = torch.empty(0)
        self.decode_backend = self.prefill_backend = "fa2"
        self.decode_use_tensor_cores = True
        self.decode_uses_dequant_workspace = False
        self.dispatch_reason = None
        self.forward_metadata: Any = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.forward_metadata = "stock"

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.forward_metadata = "stock graph"


class AttentionType(Enum):
    DECODER = "decoder"


class RadixAttention(torch.nn.Module):
    """A layer of Llama 3 8B."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        plain = {"sliding_window_size": -1, "attn_type": AttentionType.DECODER, "is_cross_attention": False}
        shape = {"tp_q_head_num": 32, "tp_k_head_num": 8, "qk_head_dim": 128, "v_head_dim": 128}
        self.__dict__.update({**plain, **shape, "logit_cap": 0.0, **more})


@pytest.fixture
def backend_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes: dict[str, dict[str, Any]] = {
        "flashinfer": {
            "BatchDecodeWithPagedKVCacheWrapper": lambda *_, **__: PagedKernel(is_decode=True),
            "BatchPrefillWithPagedKVCacheWrapper": lambda *_, **__: PagedKernel(is_decode=False),
        },
        "sglang.srt.layers.attention.flashinfer_backend": {
            "DecodeMetadata": lambda wrappers: wrappers,
            "FlashInferAttnBackend": StockBackend,
            "_safe_merge_state": merge_state,
        },
        "sglang.srt.layers.radix_attention": {
            "AttentionType": AttentionType,
            "RadixAttention": RadixAttention,
        },
    }
    for name, members in fakes.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in (f"{OURS}.covered", f"{OURS}.flashinfer_backend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from preble_sgl.runtime_ext.plugin.shared_prefix import flashinfer_backend

    yield flashinfer_backend.SharedPrefixFlashInferBackend
    for name in (f"{OURS}.covered", f"{OURS}.flashinfer_backend"):
        sys.modules.pop(name, None)


def made(backend_class: Any, num: int, prefix_len: int, layers: list[RadixAttention] | None = None) -> Any:
    """Return a backend whose first `num` requests share a prefix."""
    table = torch.arange(num * (prefix_len + 50), dtype=torch.int32).reshape(num, -1)
    table[:, :prefix_len] = table[0, :prefix_len].clone()
    model = torch.nn.ModuleList(layers or [RadixAttention(), RadixAttention()])
    runner = SimpleNamespace(
        model=model, req_to_token_pool=SimpleNamespace(req_to_token=table), init_new_workspace=False
    )
    return backend_class(runner)


def step(num: int, length: int, mode: str = "DECODE", **more: Any) -> Any:
    values = {
        "rids": [f"r{number}" for number in range(num)],
        "seq_lens_cpu": torch.full((num,), length),
        "req_pool_indices": torch.arange(num),
        "forward_mode": SimpleNamespace(name=mode, is_decode=lambda: mode == "DECODE"),
        "spec_info": None,
        "encoder_lens": None,
        "global_num_tokens_cpu": None,
    }
    return SimpleNamespace(**{**values, **more})


def test_a_step_that_saves_a_gigabyte_per_layer_is_run_in_two_passes(backend_class: Any) -> None:
    backend = made(backend_class, 64, 8000)
    for length in (8010, 8011):
        assert backend.goes_without_graph(step(64, length))
        backend.init_forward_metadata(step(64, length))
        (cascade,) = backend.forward_metadata
    assert (cascade._own.num_plans, cascade._shared.num_plans) == (2, 1)
    assert backend.counts == {"decode: shared": 2, "tokens saved": 2 * 63 * 8000}


def test_a_step_that_saves_less_keeps_its_graph(backend_class: Any) -> None:
    backend = made(backend_class, 8, 4000)
    assert not backend.goes_without_graph(step(8, 4010))
    backend.init_forward_metadata(step(8, 4010))  # a runtime without graphs: a pass of its own still pays
    assert backend.forward_metadata != "stock"


def test_a_stretch_that_saves_little_goes_the_stock_way(backend_class: Any) -> None:
    backend = made(backend_class, 4, 500)
    backend.init_forward_metadata(step(4, 510))
    assert backend.forward_metadata == "stock"
    assert not backend.counts


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"spec_info": object()}, "speculative decoding"),
        ({"encoder_lens": object()}, "encoder and decoder"),
        ({"global_num_tokens_cpu": [1]}, "requests of other ranks"),
        ({"seq_lens_cpu": None}, "lengths on the GPU alone"),
    ],
)
def test_a_step_that_is_not_covered_goes_the_stock_way(
    backend_class: Any, more: dict[str, Any], reason: str
) -> None:
    backend = made(backend_class, 64, 8000)
    backend.init_forward_metadata(step(64, 8010, **more))
    assert not backend.goes_without_graph(step(64, 8010, **more))
    assert backend.forward_metadata == "stock"
    assert backend.counts == {f"stock: {reason}": 2}


@pytest.mark.parametrize(
    "layers",
    [
        [RadixAttention(), RadixAttention(sliding_window_size=1024)],
        [RadixAttention(logit_cap=30.0)],
        [RadixAttention(), RadixAttention(tp_q_head_num=16)],
        [RadixAttention(v_head_dim=64)],
    ],
)
def test_a_model_that_is_not_covered_goes_the_stock_way(
    backend_class: Any, layers: list[RadixAttention]
) -> None:
    backend = made(backend_class, 64, 8000, layers)
    assert not backend.goes_without_graph(step(64, 8010))
    backend.init_forward_metadata(step(64, 8010))
    assert backend.forward_metadata == "stock"


def test_a_mistake_in_a_plan_costs_the_feature_and_not_the_server(
    backend_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = made(backend_class, 64, 8000)

    def begin_forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(backend._cascade._own, "begin_forward", begin_forward)
    backend.init_forward_metadata(step(64, 8010))
    assert backend.forward_metadata == "stock"
    assert not backend.goes_without_graph(step(64, 8011))
    assert backend.counts == {"stock: RuntimeError: no such kernel": 1}


@pytest.mark.parametrize("prepare", ["init_forward_metadata", "init_forward_metadata_out_graph"])
def test_slots_are_looked_at_again_after_a_prefill(backend_class: Any, prepare: str) -> None:
    backend = made(backend_class, 64, 8000)
    assert backend.goes_without_graph(step(64, 8010))
    backend.req_to_token_pool.req_to_token[:] = torch.arange(64 * 8050).reshape(64, -1)
    getattr(backend, prepare)(step(64, 8010, mode="EXTEND"))
    assert not backend.goes_without_graph(step(64, 8011))
