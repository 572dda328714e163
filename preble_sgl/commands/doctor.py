"""`preble-sgl doctor`: what this machine can run, and what is missing."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from preble_sgl import __version__
from preble_sgl.runtime_ext.environment import gpu_indices, missing_requirements, remedy


@dataclass(frozen=True, slots=True)
class Report:
    """The findings as text, and whether a runtime could start."""

    text: str
    healthy: bool


def examine() -> Report:
    """Look at this machine. Imports neither torch nor sglang; takes well under a second."""
    gpus = gpu_indices()
    missing = missing_requirements(gpu=bool(gpus))
    lines = [*_machine(gpus), *(f"missing: {need.problem}" for need in missing)]
    lines.append(f"run: {remedy(missing)}" if missing else "ready: try `preble-sgl demo`")
    return Report("\n".join(lines), not missing)


def _machine(gpus: tuple[int, ...]) -> Iterator[str]:
    yield f"preble_sgl {__version__}, Python {platform.python_version()} on {sys.platform}"
    yield f"{os.cpu_count()} CPU cores, {_memory_gib():.0f} GiB memory"
    yield (
        f"GPUs: {', '.join(map(str, gpus))}" if gpus else "no GPU: SGLang runs on the CPU, with small models"
    )


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
