"""How attention with shared prefixes gets into SGLang, and how an error in it is kept from SGLang."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from preble_sgl.core import WorkerId
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, server_command
from preble_sgl.runtime_ext.plugin.hooks import Hooks
from preble_sgl.runtime_ext.plugin.settings import PluginSettings
from preble_sgl.runtime_ext.ports import Ports

DECODE = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """SGLang's registry, with nothing else of it."""
    module = ModuleType("sglang.srt.layers.attention.attention_registry")
    module.__dict__["ATTENTION_BACKENDS"] = backends = {"flashinfer": lambda runner: f"stock for {runner}"}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return backends


def hooks() -> Hooks:
    return Hooks(PluginSettings(shared_prefix="flashinfer"), frozenset())


def test_ours_is_made_in_the_place_of_the_stock_one(stock: dict[str, Any]) -> None:
    hooks()._take_place_of("flashinfer", lambda runner: f"ours for {runner}")
    assert stock["flashinfer"]("a runner") == "ours for a runner"


def test_the_stock_one_is_made_where_ours_does_not_fit(stock: dict[str, Any]) -> None:
    hooks()._take_place_of("flashinfer", lambda runner: None)
    assert stock["flashinfer"]("a runner") == "stock for a runner"


def test_the_stock_one_is_made_where_ours_fails(stock: dict[str, Any]) -> None:
    def fail(runner: Any) -> Any:
        raise ImportError("no module named flashinfer")

    plugin = hooks()
    plugin._take_place_of("flashinfer", fail)
    assert stock["flashinfer"]("a runner") == "stock for a runner"
    assert plugin.errors == {"shared_prefix": "ImportError: no module named flashinfer"}


@pytest.mark.parametrize(
    ("stock_may", "shares", "may"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_step_that_shares_enough_runs_without_its_graph(
    stock: dict[str, Any], stock_may: bool, shares: bool, may: bool
) -> None:
    plugin = hooks()
    plugin._take_place_of("flashinfer", lambda _: SimpleNamespace(goes_without_graph=lambda _: shares))
    stock["flashinfer"]("a runner")
    assert plugin.may_use_graph(lambda *_: stock_may, None, DECODE) is may


def test_an_error_leaves_the_graph(stock: dict[str, Any]) -> None:
    plugin = hooks()
    plugin._take_place_of("flashinfer", lambda _: SimpleNamespace())
    stock["flashinfer"]("a runner")
    assert plugin.may_use_graph(lambda *_: True, None, DECODE)
    assert "goes_without_graph" in plugin.errors["shared_prefix_gpu"]


@pytest.mark.parametrize(("gpus", "backend"), [((), "torch_native"), ((0,), "flashinfer")])
def test_it_takes_the_place_of_the_backend_of_the_device(
    tiny_model: Path, gpus: tuple[int, ...], backend: str
) -> None:
    spec = LaunchSpec(model_path=tiny_model, worker_id=WorkerId("a"), gpus=gpus, shared_prefix=True)
    command = server_command(spec, Ports(http=1, nccl=2, events=3, replay=4, load=5), frozenset())
    assert command[command.index("--attention-backend") + 1] == backend
    assert spec.plugin_settings.shared_prefix == backend
