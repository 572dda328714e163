"""Programs and rows from files, with errors that name the place."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson

from preble_sgl.dsl.batch import Row
from preble_sgl.dsl.program import Program
from preble_sgl.errors import InputError


def load_program(spec: str) -> Program[Any, Any]:
    """Load the program that `FILE` or `FILE:NAME` names. Raises InputError when there is no such one."""
    file, _, name = spec.partition(":")
    module = _load_module(Path(file))
    found = {key: value for key, value in vars(module).items() if isinstance(value, Program)}
    if name and name not in found:
        raise InputError(f"{file} has no program {name}; it has: {', '.join(found) or 'none'}")
    if not name and len(found) != 1:
        raise InputError(f"{file} has {len(found)} programs ({', '.join(found)}): name one as {file}:NAME")
    return found[name] if name else next(iter(found.values()))


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that pydantic and dataclasses can resolve annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def shipped_program(name: str) -> Path:
    """Return the file of a program of this project: beside the package, or installed inside it."""
    package = Path(__file__).parent.parent
    beside = package.parent / "programs" / f"{name}.py"
    return beside if beside.is_file() else package / "programs" / f"{name}.py"


def load_rows(path: Path) -> list[Row]:
    """Read JSON lines; empty lines are skipped. Raises InputError with the line number."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: --rows takes a file of JSON lines")
    rows = [
        _row(path, number, line)
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if line.strip()
    ]
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error}); every line must be one JSON object") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: not a JSON object of arguments, but {type(row).__name__}")
    return row
