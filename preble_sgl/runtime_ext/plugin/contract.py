"""What the plugin relies on in SGLang, checked in its source before anything starts.

The hook mechanism of SGLang is documented; what we hook is internal and moves. So each target is looked for
in the source of the SGLang that is installed, without importing it, and its parameters are compared with
those that we use. A broken contract means a runtime without the plugin, never a broken runtime.
"""

import ast
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

SRT = "sglang.srt"


@dataclass(frozen=True, slots=True)
class Target:
    """A function or method, and the parameters that we name or pass, in order. Others need defaults."""

    module: str
    name: str
    parameters: tuple[str, ...]

    @property
    def path(self) -> str:
        """The dotted path that a hook is registered for."""
        return f"{self.module}.{self.name}"


Feature = Literal["marker", "order", "events", "pins", "load", "shared_prefix", "shared_prefix_gpu"]

STEP = Target(f"{SRT}.managers.scheduler", "Scheduler.process_batch_result", ("self", "batch", "result"))
IDLE = Target(f"{SRT}.managers.scheduler", "Scheduler.on_idle", ("self",))
ORDER = Target(f"{SRT}.managers.schedule_policy", "SchedulePolicy.calc_priority", ("self", "waiting_queue"))
LOAD_SOCKET = Target(f"{SRT}.managers.scheduler_components.load_publisher", "_open_pub_socket", ("endpoint",))
STATE = Target(f"{SRT}.managers.scheduler", "Scheduler.get_internal_state", ("self", "recv_req"))
FLUSH = Target(f"{SRT}.managers.scheduler", "Scheduler.flush_cache", ("self",))
REGISTER = Target(
    f"{SRT}.plugins.hook_registry", "HookRegistry.register", ("cls", "target", "hook", "hook_type")
)
PUBLISH = Target(
    f"{SRT}.managers.scheduler_components.kv_events_publisher",
    "SchedulerKvEventsPublisher.publish_kv_events",
    ("self",),
)
TREE = f"{SRT}.mem_cache.rust_tree_core.adapter"
MATCH = Target(TREE, "RustUnifiedTreeCore.match_full_device_prefix", ("self", "key"))
HOLD = Target(TREE, "RustUnifiedTreeCore.inc_full_pin", ("self", "node_id"))
LET_GO = Target(TREE, "RustUnifiedTreeCore.dec_full_pin", ("self", "node_id"))
READ_HINTS = Target(f"{SRT}.managers.kv_hints", "decode_kv_hints_envelope", ("value",))

RADIX_KEY = Target(f"{SRT}.mem_cache.common", "_req_radix_key", ("tree_cache", "req", "token_ids"))

ATTENTION = f"{SRT}.layers.attention"
STOCK_ATTENTION = f"{ATTENTION}.torch_native_backend"
FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")
REGISTER_ATTENTION = Target(f"{ATTENTION}.attention_registry", "register_attention_backend", ("name",))
PREPARE = Target(STOCK_ATTENTION, "TorchNativeAttnBackend.init_forward_metadata", ("self", "forward_batch"))
DECODE = Target(STOCK_ATTENTION, "TorchNativeAttnBackend.forward_decode", FORWARD)
EXTEND = Target(STOCK_ATTENTION, "TorchNativeAttnBackend.forward_extend", FORWARD)
GPU_ATTENTION = f"{ATTENTION}.flashinfer_backend"
PREPARE_GPU = Target(GPU_ATTENTION, "FlashInferAttnBackend.init_forward_metadata", ("self", "forward_batch"))
PREPARE_GRAPH = Target(
    GPU_ATTENTION, "FlashInferAttnBackend.init_forward_metadata_out_graph", ("self", "forward_batch")
)
DECODE_GPU = Target(GPU_ATTENTION, "FlashInferAttnBackend.forward_decode", FORWARD)
GRAPH = Target(
    f"{SRT}.model_executor.runner.decode_cuda_graph_runner",
    "DecodeCudaGraphRunner.can_run_graph",
    ("self", "forward_batch"),
)

NEEDS: dict[Feature, tuple[Target, ...]] = {
    "marker": (STATE, REGISTER),
    "order": (ORDER, STEP),
    "events": (STEP, PUBLISH),
    "pins": (STEP, IDLE, FLUSH, MATCH, HOLD, LET_GO, READ_HINTS, RADIX_KEY),
    "load": (LOAD_SOCKET,),
    "shared_prefix": (REGISTER_ATTENTION, PREPARE, DECODE, EXTEND),
    "shared_prefix_gpu": (REGISTER_ATTENTION, PREPARE_GPU, PREPARE_GRAPH, DECODE_GPU, GRAPH),
}


@lru_cache
def broken_features(folder: Path | None = None) -> dict[Feature, str]:
    """Return the features that cannot work and why; all of them without the marker. Takes ~0.1 s once.

    `folder`: of the `sglang` package, by default the one that would be imported.
    """
    folder = folder or _installed()
    if folder is None:
        return dict.fromkeys(NEEDS, "sglang is not installed")
    parsed = lru_cache(partial(_parsed, folder))
    broken: dict[Feature, str] = {}
    for feature, targets in NEEDS.items():
        problems = [_problem(parsed(target.module), target) for target in targets]
        if any(problems):
            broken[feature] = "; ".join(filter(None, problems))
    return dict.fromkeys(NEEDS, broken["marker"]) if "marker" in broken else broken


def _installed() -> Path | None:
    spec = find_spec("sglang")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _parsed(folder: Path, module: str) -> ast.Module | None:
    file = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(file.read_text()) if file.is_file() else None


def _problem(module: ast.Module | None, target: Target) -> str | None:
    """Say what does not fit."""
    node: ast.AST | None = module
    for name in target.name.split("."):
        node = _member(node, name)
    if not isinstance(node, ast.FunctionDef):
        return f"{target.path} is gone"
    found = [*node.args.posonlyargs, *node.args.args]
    names = tuple(argument.arg for argument in found)
    num_required = len(found) - len(node.args.defaults)
    wanted = len(target.parameters)
    if names[:wanted] != target.parameters or num_required > wanted:
        return f"{target.path} takes ({', '.join(names)}), not ({', '.join(target.parameters)})"
    return None


def _member(node: ast.AST | None, name: str) -> ast.AST | None:
    """Return the definition of a name directly in a module or class."""
    for child in ast.iter_child_nodes(node) if node is not None else ():
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == name:
            return child
    return None
