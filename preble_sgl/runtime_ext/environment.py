"""What this machine can run: its GPUs, what is not installed, and the environment of a runtime's process."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from preble_sgl.runtime_ext.gpus import visible_gpus

HERE = Path(__file__).parent
CPU_STUBS = HERE / "cpu_stubs"
CPU_NO_DEPS = HERE / "cpu_no_deps.txt"

# One thread per runtime: OpenMP's barriers made decoding ten times slower on shared cores. Compiling with
# dynamo costs 15 s at the first penalised request. Without the hub a runtime starts with no network.
CPU_SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Missing:
    """One package that is absent or of the wrong version, and the command that mends it."""

    package: str
    wanted: str
    found: str | None
    command: str

    def __str__(self) -> str:
        return f"{self.problem}; run: {self.command}"

    @property
    def problem(self) -> str:
        """What is wrong, without the remedy."""
        state = "is not installed" if self.found is None else f"is {self.found}"
        return f"{self.package} {state} (needed: {self.wanted})"


def gpu_indices() -> tuple[int, ...]:
    """Return the number of every GPU that a runtime may use."""
    return tuple(gpu.index for gpu in visible_gpus())


def child_environment(gpus: Sequence[int]) -> dict[str, str]:
    """Return the whole environment for a runtime's process on GPUs of these numbers, or on the CPU."""
    if gpus:
        return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    inherited = os.environ.get("PYTHONPATH")
    search_path = os.pathsep.join([str(CPU_STUBS), *([inherited] if inherited else [])])
    return os.environ | CPU_SETTINGS | {"PYTHONPATH": search_path}


def missing_requirements(gpu: bool) -> tuple[Missing, ...]:
    """Return what has to be installed before a runtime can start, in the order to install it.

    Reads package metadata only, so it takes milliseconds and imports neither torch nor sglang.
    """
    return tuple(_missing_for_gpu() if gpu else _missing_for_cpu())


def remedy(missing: Iterable[Missing]) -> str:
    """Return one command line that installs all of it."""
    return " && ".join(dict.fromkeys(one.command for one in missing))


def _missing_for_gpu() -> Iterator[Missing]:
    return _missing(_extra("gpu"), "pip install 'preble-sgl[gpu]'")


def _missing_for_cpu() -> Iterator[Missing]:
    yield from _missing(_extra("cpu"), "pip install 'preble-sgl[cpu]'")
    yield from _missing(CPU_NO_DEPS.read_text().split(), f"pip install --no-deps -r {CPU_NO_DEPS}")


def _extra(name: str) -> Iterator[str]:
    """Yield the requirements of one extra of this package, such as `torch==2.13.0`."""
    for line in _own_requirements():
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra\s*==\s*[\"']{name}[\"']", marker):
            yield requirement.strip()


def _own_requirements() -> Iterable[str]:
    """Return what the package declares; nothing is known of a checkout that is not installed."""
    try:
        return metadata.requires("preble-sgl") or ()
    except metadata.PackageNotFoundError:
        return ()


def _missing(requirements: Iterable[str], command: str) -> Iterator[Missing]:
    for requirement in requirements:
        package, pinned = _split(requirement)
        found = _installed_version(package)
        if found is None or (pinned is not None and found.partition("+")[0] != pinned):
            yield Missing(package, requirement, found, command)


def _split(requirement: str) -> tuple[str, str | None]:
    """Return the package and, if exactly one version will do, that version. Ranges are left to pip."""
    match = re.match(r"([\w.-]+)(?:==([\w.]+)$)?", requirement)
    assert match is not None, requirement
    return match[1], match[2]


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
