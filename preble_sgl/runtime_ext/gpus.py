"""The GPUs of this machine, as NVIDIA's management library (NVML) tells them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `index` is its number among all of the machine; memory in bytes."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    free_bytes: int


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use; empty without a driver.

    CUDA_VISIBLE_DEVICES narrows the choice as CUDA reads it: numbers or (beginnings of) UUIDs, in its order,
    up to the first that is not there.
    """
    present = tuple(_present())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else tuple(_chosen(visible.split(","), present))


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    nvml = _nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def _present() -> Iterator[Gpu]:
    nvml = _nvml()
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        name, uuid = nvml.nvmlDeviceGetName(device), nvml.nvmlDeviceGetUUID(device)
        yield Gpu(index, str(name), str(uuid), int(memory.total), int(memory.free))


def _chosen(names: Sequence[str], present: Sequence[Gpu]) -> Iterator[Gpu]:
    for name in (name.strip() for name in names):
        found = [gpu for gpu in present if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]
        if len(found) != 1:
            return
        yield found[0]


def _nvml() -> Any:
    """Return the library, ready to use; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
