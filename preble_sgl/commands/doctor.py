"""`preble-sgl doctor`: what this machine can run, and what is missing."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from preble_sgl import __version__
from preble_sgl.core import ProgramId, Request, SamplingParams, WorkerId, new_request_id, token_ids
from preble_sgl.errors import InputError, PrebleError
from preble_sgl.fleet_file import load_fleet
from preble_sgl.machine import default_model
from preble_sgl.runtime_ext.environment import missing_requirements, remedy
from preble_sgl.runtime_ext.gpus import Gpu, driver_version, visible_gpus
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, check_specs
from preble_sgl.runtime_ext.launcher import launch_runtime
from preble_sgl.runtime_ext.plugin.contract import NEEDS, broken_features
from preble_sgl.runtime_ext.ports import FREE_PORTS, is_free

PACKAGES = ("sglang", "torch", "flashinfer-python", "transformers", "pyzmq")
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY = 64 * 2**20
NUM_PORTS_TRIED = 50
MIN_FREE_PORTS = 10
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Report:
    """The findings as text, and whether a runtime could start."""

    text: str
    healthy: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; `problem`: it keeps a runtime from starting, or from doing all that it could."""

    text: str
    problem: bool = False


def examine(fleet_file: Path | None = None) -> Report:
    """Look at this machine, and at a fleet file if given. Starts nothing, loads neither torch nor sglang."""
    gpus = visible_gpus()
    sections = {
        "machine": list(_machine(gpus)),
        "packages": list(_packages(gpus)),
        "plugin": list(_plugin()),
        "ports and memory": list(_ports()),
    }
    if fleet_file is not None:
        sections[str(fleet_file)] = [_fleet(fleet_file)]
    return _report(sections)


async def try_one_token(model_path: Path | None) -> Report:
    """Start one runtime, on a GPU if there is one, and let it generate one token. Takes tens of seconds."""
    gpus = visible_gpus()[:1]
    started_at = time.perf_counter()
    try:
        spec = LaunchSpec(
            model_path=model_path or default_model(),
            worker_id=WorkerId("doctor"),
            gpus=tuple(gpu.index for gpu in gpus),
        )
        async with launch_runtime(spec) as runtime:
            up_s = time.perf_counter() - started_at
            async for _ in runtime.stream(_one_token()):
                pass
            token_s = time.perf_counter() - started_at - up_s
            plugin = runtime.plugin
    except (PrebleError, InputError) as error:
        return _report({"one token": [Finding(str(error), problem=True)]})
    findings = [
        Finding(f"a runtime was ready after {up_s:.0f} s and made a token in {1000 * token_s:.0f} ms")
    ]
    if plugin is None or plugin.errors:
        why = dict(plugin.errors) if plugin else "it did not load"
        findings.append(Finding(f"the plugin does not work: {why}", problem=True))
    return _report({"one token": findings})


def _report(sections: dict[str, list[Finding]]) -> Report:
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        lines += [f"  {'✗' if finding.problem else '✓'} {finding.text}" for finding in findings]
    healthy = not any(finding.problem for findings in sections.values() for finding in findings)
    return Report("\n".join(lines), healthy)


def _machine(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    yield Finding(f"preble_sgl {__version__}, Python {platform.python_version()} on {sys.platform}")
    yield Finding(f"{os.cpu_count()} CPU cores, {_memory_gib():.0f} GiB memory")
    if not gpus:
        yield Finding("no GPU: SGLang runs on the CPU, with small models")
        return
    yield Finding(f"NVIDIA driver {driver_version()}")
    for gpu in gpus:
        free, size = gpu.free_bytes / GIB, gpu.memory_bytes / GIB
        yield Finding(f"GPU {gpu.index}: {gpu.name}, {free:.0f} of {size:.0f} GiB free")


def _packages(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    if versions:
        yield Finding(", ".join(versions))
    missing = missing_requirements(gpu=bool(gpus))
    for need in missing:
        yield Finding(need.problem, problem=True)
    if missing:
        yield Finding(f"run: {remedy(missing)}", problem=True)


def _plugin() -> Iterator[Finding]:
    broken = broken_features()
    for feature in NEEDS:
        if feature in broken:
            yield Finding(f"{feature} does not work: {broken[feature]}", problem=True)
    works = [feature for feature in NEEDS if feature not in broken]
    if works:
        yield Finding(f"works inside this SGLang: {', '.join(works)}")


def _ports() -> Iterator[Finding]:
    num_free = sum(is_free(port) for port in FREE_PORTS[:NUM_PORTS_TRIED])
    first, last = FREE_PORTS[0], FREE_PORTS[-1]
    yield Finding(
        f"{num_free} of the {NUM_PORTS_TRIED} ports tried in {first}–{last} are free", num_free < 10
    )
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        advice = "" if free >= MIN_SHARED_MEMORY else ": enlarge it (docker run --shm-size=1g)"
        yield Finding(f"{free / GIB:.1f} GiB free in {SHARED_MEMORY}{advice}", bool(advice))


def _fleet(path: Path) -> Finding:
    try:
        plan = load_fleet(path)
        check_specs(plan.specs)
    except (InputError, PrebleError) as error:
        return Finding(str(error), problem=True)
    names = [*(spec.worker_id for spec in plan.specs), *(spec.name for spec in plan.attach)]
    return Finding(f"{plan.policy} over {', '.join(names)}")


def _one_token() -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("doctor"),
        call_path="doctor",
        prompt=token_ids([1, 2, 3]),
        sampling=SamplingParams(max_new_tokens=1, ignore_eos=True),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
