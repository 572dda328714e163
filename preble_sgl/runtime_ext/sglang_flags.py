"""SGLang's command-line flags by name: written as arguments, and checked before anything starts.

The flags are read from the source of the SGLang that is installed, without importing it. With a layout that
is not known nothing is checked, and SGLang itself refuses what it does not know.
"""

import ast
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import orjson

from preble_sgl.errors import InputError

FlagValue: TypeAlias = str | int | float | bool | list[str | int | float] | dict[str, object]

OURS = {
    "model_path": "model_path",
    "model": "model_path",
    "port": "port",
    "max_total_tokens": "kv_tokens",
    "schedule_policy": "order",
    "tp_size": "gpus",
    "tensor_parallel_size": "gpus",
    "base_gpu_id": "gpus",
}
"""Flags that the launcher sets itself, and what sets them."""
FIXED = {
    "host": "runtimes listen on loopback only",
    "nccl_port": "it is chosen for each runtime",
    "kv_events_config": "the scheduler needs the events",
    "load_publish_endpoint": "the scheduler needs the load",
}
NOT_LOADABLE = {
    "billm": "its 1-bit weights have no kernel there",
    "onebit": "its 1-bit weights have no kernel there",
    "pb-llm": "its 1-bit weights have no kernel there",
    "exl2": "it is ExLlama's",
    "exl3": "it is ExLlama's",
    "hqq": "it has no loader there",
    "quip": "it has no loader there",
    "aqlm": "it has no loader there",
    "eetq": "it has no loader there",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. `choices`: None if any value will do, or if they cannot be read."""

    name: str
    choices: tuple[str, ...] | None = None


def flag_arguments(flags: Mapping[str, FlagValue]) -> list[str]:
    """Return flags as command-line arguments: True as the bare flag, False as none, a table as JSON."""
    return [argument for name, value in flags.items() for argument in _arguments(name, value)]


def check_flags(flags: Mapping[str, FlagValue]) -> None:
    """Raise InputError for a flag that SGLang does not have, a value it refuses, or one that is not free."""
    known = known_flags()
    for name, value in flags.items():
        if name in OURS:
            raise InputError(f"{name} is set by `{OURS[name]}`: give that instead")
        if name in FIXED:
            raise InputError(f"{name} cannot be given: {FIXED[name]}")
        if known and name not in known:
            raise InputError(f"SGLang has no flag {name}{_did_you_mean(name, known)}")
        choices = known[name].choices if known else None
        if choices is not None and name != "quantization" and str(value) not in choices:
            raise InputError(f"{name}={value}: SGLang takes {', '.join(choices)}")


def check_quantization(model_path: Path, quantization: str | None) -> None:
    """Raise InputError if SGLang cannot load how a model's weights are quantised.

    `quantization` is what `--quantization` is to be; the checkpoint may name a method, too.
    """
    loadable = quantization_methods()
    for method, source in ((quantization, "quantization"), (_checkpoint_method(model_path), str(model_path))):
        if method is None or not loadable or method.lower() in loadable:
            continue
        why = next((f" ({why})" for name, why in NOT_LOADABLE.items() if name in method.lower()), "")
        raise InputError(
            f"{source}: SGLang cannot load {method}{why}; convert the model to one of: {', '.join(loadable)}"
        )


@lru_cache
def known_flags() -> dict[str, Flag]:
    """Return SGLang's flags by name with underscores, aliases too; empty if they cannot be read."""
    groups = _group_folder()
    if groups is None:
        return {}
    lists = _lists(_parsed(groups / "choices.py"))
    files = sorted((groups / "fields").glob("*.py"))
    flags = [flag for file in files for flag in _flags(_parsed(file), lists)]
    return {flag.name: flag for flag in (*flags, Flag("config"))}


@lru_cache
def quantization_methods() -> tuple[str, ...]:
    """Return the quantisation methods that SGLang can load; empty if they cannot be read."""
    groups = _group_folder()
    if groups is None:
        return ()
    chosen = _lists(_parsed(groups / "choices.py")).get("QUANTIZATION_CHOICES", ())
    methods = _dictionary_keys(_parsed(groups.parent / "layers" / "quantization" / "__init__.py"))
    return tuple(sorted({*chosen, *methods})) if chosen else ()


def _arguments(name: str, value: FlagValue) -> Iterator[str]:
    if value is False:
        return
    yield "--" + name.replace("_", "-")
    if isinstance(value, dict):
        yield orjson.dumps(value).decode()
    elif isinstance(value, list):
        yield from map(str, value)
    elif value is not True:
        yield str(value)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _checkpoint_method(model_path: Path) -> str | None:
    """Return how a checkpoint says that it is quantised."""
    try:
        config = json.loads((model_path / "config.json").read_text())
    except (OSError, ValueError):
        return None
    method = (config.get("quantization_config") or {}).get("quant_method")
    return str(method) if method else None


def _group_folder() -> Path | None:
    spec = find_spec("sglang")
    if spec is None or not spec.origin:
        return None
    folder = Path(spec.origin).parent / "srt" / "arg_groups"
    return folder if (folder / "fields").is_dir() and (folder / "choices.py").is_file() else None


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])


def _lists(module: ast.Module) -> dict[str, tuple[str, ...]]:
    """Return the lists of texts that a module gives names to."""
    return {
        target.id: texts
        for node in module.body
        if isinstance(node, ast.Assign) and (texts := _texts(node.value)) is not None
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _dictionary_keys(module: ast.Module) -> Iterator[str]:
    """Yield the texts that are keys of dictionaries a module gives names to."""
    for node in module.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        for key in value.keys if isinstance(value, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value


def _flags(module: ast.Module, lists: Mapping[str, tuple[str, ...]]) -> Iterator[Flag]:
    fields = (node for owner in module.body if isinstance(owner, ast.ClassDef) for node in owner.body)
    for field in fields:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            options = _options(field.annotation)
            choices = options.get("choices")
            known = lists.get(choices.id) if isinstance(choices, ast.Name) else _texts(choices)
            for name in (field.target.id, *(_texts(options.get("aliases")) or ())):
                yield Flag(name.removeprefix("--").replace("-", "_"), known)


def _options(annotation: ast.expr) -> dict[str, ast.expr]:
    """Return the keywords of `Arg(...)` in an annotation."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Arg":
            return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    return {}


def _texts(node: ast.expr | None) -> tuple[str, ...] | None:
    """Return a literal list as texts; None if it is something else."""
    if not isinstance(node, ast.List):
        return None
    values = [item.value for item in node.elts if isinstance(item, ast.Constant)]
    return tuple(map(str, values)) if len(values) == len(node.elts) else None
