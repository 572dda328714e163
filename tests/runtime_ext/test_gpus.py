"""The GPUs that a runtime may use, from a scripted stand-in for NVIDIA's library."""

import sys
from types import SimpleNamespace

import pytest

from preble_sgl.runtime_ext.environment import gpu_indices
from preble_sgl.runtime_ext.gpus import Gpu, driver_version, visible_gpus

UUIDS = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3")


class NoDriver(Exception):
    """What the library raises."""


def library(*, has_driver: bool) -> SimpleNamespace:
    def init() -> None:
        if not has_driver:
            raise NoDriver

    return SimpleNamespace(
        NVMLError=NoDriver,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(UUIDS),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda device: "NVIDIA H100",
        nvmlDeviceGetUUID=lambda device: UUIDS[device],
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(total=80_000, free=70_000 - device),
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(has_driver=True))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("three_gpus")
def test_a_gpu_is_told_with_its_name_and_memory() -> None:
    assert visible_gpus()[1] == Gpu(1, "NVIDIA H100", "GPU-aabb-2", 80_000, 69_999)
    assert driver_version() == "570.1"


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, (0, 1, 2)),
        ("2, 0", (2, 0)),
        ("", ()),
        ("GPU-cccc-3,GPU-aabb", (2, 1)),
        ("0,GPU-aa,2", (0,)),  # not clear which, and CUDA stops there
        ("1,7,2", (1,)),
        ("-1", ()),
    ],
)
def test_those_that_may_be_used_are_in_the_order_in_which_cuda_counts_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: tuple[int, ...]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_indices() == indices


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(has_driver=False))
    assert visible_gpus() == ()
    assert driver_version() is None
