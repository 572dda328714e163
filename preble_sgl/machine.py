"""Which runtimes this machine can start: one per GPU, or a few on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.predict import WorkerSpec
from preble_sgl.profiles import load_profile
from preble_sgl.runtime_ext.environment import gpu_indices
from preble_sgl.runtime_ext.launch_spec import CPU_KV_TOKENS, LaunchSpec, require_installed

CPU_RUNTIMES = 2
NEEDED_FOR_MODEL = "pip install numpy safetensors"


def launch_specs(
    model_path: str | Path | None,
    runtimes: int | None,
    kv_tokens: int | None,
    port: int | None,
    extra_args: tuple[str, ...],
) -> list[LaunchSpec]:
    """Return one spec per runtime: on the GPUs if there are any, else on the CPU."""
    places = _places(runtimes)
    require_installed(gpu=places[0] is not None)
    model = Path(model_path) if model_path else default_model()
    return [
        LaunchSpec(
            model_path=model,
            worker_id=_worker_id(i, gpu),
            gpus=() if gpu is None else (gpu,),
            port=None if port is None else port + i,
            kv_tokens=kv_tokens,
            extra_args=extra_args,
        )
        for i, gpu in enumerate(places)
    ]


def planned_workers(runtimes: int | None, kv_tokens: int | None) -> list[WorkerSpec]:
    """Return the workers that `Fleet.launch` would start, for predictions before anything runs.

    Without `kv_tokens` a CPU runtime's default is assumed, on a GPU too: its real size is known only once
    it runs.
    """
    return [
        WorkerSpec(_worker_id(i, gpu), kv_tokens or CPU_KV_TOKENS, 1, profile_of(on_cpu=gpu is None))
        for i, gpu in enumerate(_places(runtimes))
    ]


def _worker_id(i: int, gpu: int | None) -> WorkerId:
    return WorkerId(f"cpu{i}" if gpu is None else f"gpu{gpu}")


def profile_of(*, on_cpu: bool) -> CostProfile:
    """Return what work is assumed to cost: as measured on a CPU, or on the one GPU we have figures of."""
    return load_profile("cpu-tiny" if on_cpu else "a6000-mistral-7b").cost


def _places(runtimes: int | None) -> Sequence[int | None]:
    """Return where runtimes go: GPU indices, or None for the CPU."""
    gpus = gpu_indices()
    if runtimes is not None and runtimes < 1:
        raise InputError(f"{runtimes} runtimes asked for: at least 1 is needed")
    if gpus and runtimes is not None and runtimes > len(gpus):
        raise InputError(f"{runtimes} runtimes asked for, but there are {len(gpus)} GPUs")
    return gpus[:runtimes] if gpus else [None] * (runtimes or CPU_RUNTIMES)


def default_model() -> Path:
    """Return the small random-weight model that is used when no model is given, written on first use."""
    path: Path = _tiny_model().ensure_tiny_model()
    return path


def write_model(directory: Path, seed: int) -> Path:
    """Write that model to a directory."""
    path: Path = _tiny_model().write_tiny_model(directory, seed=seed)
    return path


def _tiny_model() -> ModuleType:
    """Return the module that writes it, which needs more than the base install."""
    try:
        from preble_sgl.runtime_ext import tiny_model
    except ModuleNotFoundError as error:
        raise InputError(
            f"the small default model needs {error.name}: give --model-path, or run: {NEEDED_FOR_MODEL}"
        ) from error
    return tiny_model
