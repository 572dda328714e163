"""What a fleet consists of, and the `fleet.toml` that says so.

    model_path = "models/llama"          # relative to the file; default: a small model with random weights
    policy = "preble_e2"

    [runtimes]                           # defaults of all runtimes
    kv_tokens = 100000
    order = "preble_groups"
    profile = "h100-llama3-8b"           # what work costs: a name, or a .toml of `preble-sgl calibrate`
    [runtimes.sglang]                    # any flag of SGLang by its name
    mem_fraction_static = 0.85

    [[runtime]]
    gpus = [0]
    [[runtime]]
    gpus = [1, 2]                        # a tensor-parallel group
    quantization = "fp8"
    kv_tokens = 200000
    [[runtime]]
    device = "cpu"
    count = 2

    [[attach]]
    url = "http://127.0.0.1:30000"
    api_key_env = "SGLANG_KEY"           # the variable that holds the key, never the key

With neither `[[runtime]]` nor `[[attach]]` there is one runtime per GPU, or two on the CPU.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError
from preble_sgl.machine import CPU_RUNTIMES, default_model
from preble_sgl.runtime_ext.environment import gpu_indices
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.sglang_flags import FlagValue
from preble_sgl.runtime_ext.supervisor import AttachSpec
from preble_sgl.sim.wait_queue import WaitOrder

DEFAULT_POLICY = "preble_e2"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What to start and what to attach to. `profiles`: the cost profile of workers that name one."""

    specs: tuple[LaunchSpec, ...] = ()
    attach: tuple[AttachSpec, ...] = ()
    profiles: Mapping[WorkerId, str] = field(default_factory=dict)
    policy: str = DEFAULT_POLICY


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Settings(_Table):
    """What `[runtimes]` and each `[[runtime]]` may say."""

    kv_tokens: int | None = Field(default=None, gt=0)
    order: WaitOrder | None = None
    plugin: bool | None = None
    max_pinned_share: float | None = Field(default=None, ge=0, le=1)
    shared_prefix: bool | None = None
    profile: str | None = None
    quantization: str | None = None
    sglang: dict[str, Any] = Field(default_factory=dict)
    extra_args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    log_dir: str | None = None
    startup_timeout_s: float | None = Field(default=None, gt=0)


class _Runtime(_Settings):
    name: str | None = None
    gpus: list[int] = Field(default_factory=list)
    device: Literal["cpu", "gpu"] | None = None
    count: int = Field(default=1, ge=1)
    port: int | None = Field(default=None, gt=0, lt=65536)


class _Attach(_Table):
    url: str
    name: str | None = None
    api_key_env: str | None = None
    profile: str | None = None


class _File(_Table):
    model_path: str | None = None
    policy: str = DEFAULT_POLICY
    runtimes: _Settings = Field(default_factory=_Settings)
    runtime: list[_Runtime] = Field(default_factory=list)
    attach: list[_Attach] = Field(default_factory=list)


def load_fleet(path: Path) -> FleetPlan:
    """Read a `fleet.toml`. Raises InputError, in one line, for what it says wrong."""
    file = _read(path)
    wanted = file.runtime or ([] if file.attach else _everything())
    try:
        _check(wanted)
        model = _model(file, path) if wanted else Path()
        built = list(_specs(file.runtimes, wanted, model, path.parent))
        attach = [_attach_spec(one) for one in file.attach]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    profiles = {spec.worker_id: profile for spec, profile in built if profile}
    profiles |= {spec.name: one.profile for spec, one in zip(attach, file.attach, strict=True) if one.profile}
    return FleetPlan(
        specs=tuple(spec for spec, _ in built),
        attach=tuple(attach),
        profiles=profiles,
        policy=file.policy,
    )


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place}: {first['msg']}") from None


def _everything() -> list[_Runtime]:
    """Return one runtime per GPU, or two on the CPU."""
    gpus = gpu_indices()
    return [_Runtime(gpus=[gpu]) for gpu in gpus] or [_Runtime(device="cpu", count=CPU_RUNTIMES)]


def _model(file: _File, path: Path) -> Path:
    return path.parent / file.model_path if file.model_path else default_model()


def _check(wanted: Sequence[_Runtime]) -> None:
    used = [gpu for runtime in wanted for gpu in runtime.gpus]
    for gpu in sorted({gpu for gpu in used if used.count(gpu) > 1}):
        raise InputError(f"GPU {gpu} is given to two runtimes")
    for runtime in wanted:
        if runtime.gpus and (runtime.device == "cpu" or runtime.count > 1):
            raise InputError(f"a runtime on gpus = {runtime.gpus} is one, and not on the CPU")
        if not runtime.gpus and runtime.device != "cpu":
            raise InputError('a [[runtime]] needs gpus = [...] or device = "cpu"')


def _specs(
    defaults: _Settings, wanted: Sequence[_Runtime], model: Path, folder: Path
) -> Iterator[tuple[LaunchSpec, str | None]]:
    """Yield what to start, and the profile of each."""
    num_cpu = 0
    for runtime in wanted:
        for number in range(runtime.count):
            name = "-".join(f"gpu{gpu}" for gpu in runtime.gpus) or f"cpu{num_cpu}"
            num_cpu += not runtime.gpus
            if runtime.name:
                name = runtime.name if runtime.count == 1 else f"{runtime.name}{number}"
            port = None if runtime.port is None else runtime.port + number
            spec = LaunchSpec(
                model_path=model,
                worker_id=WorkerId(name),
                gpus=tuple(runtime.gpus),
                port=port,
                **_merged(defaults, runtime, folder),
            )
            yield spec, runtime.profile or defaults.profile


def _merged(defaults: _Settings, runtime: _Settings, folder: Path) -> dict[str, Any]:
    """Return the settings of one runtime: its own before the defaults', tables and lists together."""
    names = ("kv_tokens", "order", "plugin", "max_pinned_share", "shared_prefix", "startup_timeout_s")
    given = {name: _first(getattr(runtime, name), getattr(defaults, name)) for name in names}
    flags: dict[str, FlagValue] = {**defaults.sglang, **runtime.sglang}
    quantization = runtime.quantization or defaults.quantization
    log_dir = runtime.log_dir or defaults.log_dir
    return {
        **{name: value for name, value in given.items() if value is not None},
        "flags": flags | ({"quantization": quantization} if quantization else {}),
        "extra_args": (*defaults.extra_args, *runtime.extra_args),
        "env": defaults.env | runtime.env,
        "log_dir": folder / log_dir if log_dir else None,
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _attach_spec(attach: _Attach) -> AttachSpec:
    key = None
    if attach.api_key_env is not None:
        key = os.environ.get(attach.api_key_env)
        if not key:
            raise InputError(f"attach.url = {attach.url}: set the variable {attach.api_key_env} to its key")
    return AttachSpec(url=attach.url, worker_id=WorkerId(attach.name) if attach.name else None, api_key=key)
