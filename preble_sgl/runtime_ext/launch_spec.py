"""One runtime to start, what is refused before anything starts, and SGLang's command line for it."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, LaunchError
from preble_sgl.runtime_ext.environment import gpu_indices, missing_requirements, remedy
from preble_sgl.runtime_ext.model_files import require_model
from preble_sgl.runtime_ext.plugin.contract import Feature
from preble_sgl.runtime_ext.plugin.settings import AttentionBackend, PluginSettings
from preble_sgl.runtime_ext.ports import HOST, Ports, is_free
from preble_sgl.runtime_ext.sglang_flags import FlagValue, check_flags, check_quantization, flag_arguments
from preble_sgl.sim.wait_queue import STOCK_ORDERS, WaitOrder

log = logging.getLogger("preble_sgl")

CPU_KV_TOKENS = 65536
CPU_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mem-fraction-static", "0.1"),
    *("--dtype", "float32"),  # as fast here, and answers do not change with what else runs or is cached
    "--sleep-on-idle",  # or each idle runtime polls with most of a core
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One runtime to start: on one GPU, on several as a tensor-parallel group, or on the CPU without `gpus`.

    `port=None` takes a free one. `kv_tokens` is the size of the KV cache in tokens; `None` leaves it to
    SGLang on a GPU and means 65536 on a CPU. `order`: its wait queue. `plugin=False` starts stock SGLang.
    `flags` are SGLang's by name (`mem_fraction_static`); they and then `extra_args` come last on its
    command line, so they win. `shared_prefix`: attention reads a prefix once for all requests of a batch that
    share it (untested on GPUs, where it takes the place of FlashInfer's). `log_dir`: where its log is kept;
    None keeps it only if it dies by itself. A runtime that dies at its start is noticed at once;
    `startup_timeout_s` is for one that hangs.
    """

    model_path: Path
    worker_id: WorkerId
    gpus: tuple[int, ...] = ()
    port: int | None = None
    kv_tokens: int | None = None
    order: WaitOrder = "lpm"
    plugin: bool = True
    max_pinned_share: float = 0.3
    shared_prefix: bool = False
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    extra_args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    log_dir: Path | None = None
    startup_timeout_s: float = 600.0

    @property
    def plugin_settings(self) -> PluginSettings:
        """What the plugin in its processes is told."""
        return PluginSettings(
            order=self.order, max_pinned_share=self.max_pinned_share, shared_prefix=self.attention_replaced
        )

    @property
    def attention_replaced(self) -> AttentionBackend | None:
        """SGLang's attention backend whose place ours takes."""
        if not self.shared_prefix:
            return None
        return "flashinfer" if self.gpus else "torch_native"


def check_specs(specs: Sequence[LaunchSpec]) -> None:
    """Refuse what cannot work before anything is started. Raises InputError or LaunchError."""
    require_distinct("worker_id", (spec.worker_id for spec in specs))
    require_distinct("port", (spec.port for spec in specs if spec.port is not None))
    for spec in specs:
        require_model(spec.model_path)
        _check_attention(spec)
        check_flags(spec.flags)
        quantization = spec.flags.get("quantization")
        check_quantization(spec.model_path, None if quantization is None else str(quantization))
        if spec.port is not None and not is_free(spec.port):
            raise InputError(f"port {spec.port} is in use: choose another, or none to get a free one")
    _require_gpus({gpu for spec in specs for gpu in spec.gpus})
    for on_gpu in {bool(spec.gpus) for spec in specs}:
        require_installed(gpu=on_gpu)


def _check_attention(spec: LaunchSpec) -> None:
    replaced = spec.attention_replaced
    if replaced and not spec.plugin:
        raise InputError("shared_prefix needs the plugin: leave out one of shared_prefix and plugin = false")
    if replaced and spec.flags.get("attention_backend", replaced) != replaced:
        raise InputError(f"shared_prefix takes the place of {replaced}: leave out attention_backend")
    if replaced == "flashinfer":
        log.warning("runtime %s: shared_prefix has not been tested on GPUs", spec.worker_id)


def require_installed(*, gpu: bool) -> None:
    """Raise LaunchError, with the command that mends it, if SGLang cannot run as installed here."""
    if missing := missing_requirements(gpu):
        problems = "; ".join(need.problem for need in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LaunchError(f"{problems}{more}; run: {remedy(missing)}")


def server_command(spec: LaunchSpec, ports: Ports, features: frozenset[Feature]) -> list[str]:
    """Return the command that starts SGLang, listening on loopback only. `features`: of the plugin in it."""
    kv_tokens = CPU_KV_TOKENS if spec.kv_tokens is None and not spec.gpus else spec.kv_tokens
    return [
        *(sys.executable, "-W", "ignore", "-m", "sglang.launch_server"),
        *("--model-path", str(spec.model_path), "--random-seed", "0"),
        *("--host", HOST, "--port", str(ports.http), "--nccl-port", str(ports.nccl)),
        *("--enable-metrics", "--enable-cache-report", "--log-level-http", "warning"),
        *("--incremental-streaming-output", "--constrained-json-disable-any-whitespace"),
        *("--kv-events-config", _kv_events(ports)),
        *_order_arguments(spec.order, "order" in features),
        # The plugin makes the wildcard address loopback's; SGLang accepts no other.
        *(("--load-publish-endpoint", f"tcp://*:{ports.load}") if "load" in features else ()),
        *(CPU_ARGUMENTS if not spec.gpus else ()),
        *(("--attention-backend", "flashinfer") if spec.attention_replaced == "flashinfer" else ()),
        *(("--tp-size", str(len(spec.gpus))) if len(spec.gpus) > 1 else ()),
        *(() if kv_tokens is None else ("--max-total-tokens", str(kv_tokens))),
        *flag_arguments(spec.flags),
        *spec.extra_args,
    ]


def _order_arguments(order: WaitOrder, plugin_orders: bool) -> Iterable[str]:
    """Return what makes the wait queue keep an order; without the plugin, priorities on the wire do.

    Orders of the plugin go by what SGLang's `lpm` has matched.
    """
    if order in STOCK_ORDERS or plugin_orders:
        return ("--schedule-policy", "fcfs" if order == "fcfs" else "lpm")
    return ("--schedule-policy", "fcfs", "--enable-priority-scheduling", "--disable-priority-preemption")


def _kv_events(ports: Ports) -> str:
    config = {
        "publisher": "zmq",
        "endpoint": f"tcp://{HOST}:{ports.events}",
        "bind": True,
        "replay_endpoint": f"tcp://{HOST}:{ports.replay}",
    }
    return orjson.dumps(config).decode()


def require_distinct(what: str, values: Iterable[object]) -> None:
    """Raise InputError if two runtimes are given the same."""
    for value, count in Counter(values).items():
        if count > 1:
            raise InputError(f"{what}={value!r} is given to {count} runtimes: each needs its own")


def _require_gpus(wanted: set[int]) -> None:
    if not wanted:
        return
    present = gpu_indices()
    for gpu in sorted(wanted.difference(present)):
        raise InputError(f"there is no GPU {gpu}; this process may use: {present or 'none'}")
