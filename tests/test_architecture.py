"""Who may import whom, and what an import may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import preble_sgl

PACKAGE = Path(preble_sgl.__file__).parent
ENGINE_MODEL = {
    *("engine", "engine_config", "decode_batch", "prefill_batch", "jobs", "pins"),
    *("kv_cache", "cache_news", "wait_queue", "waiting_line", "step_cost"),
}
"""What of `sim` models one runtime. It imports nothing else, so that runtimes can be emulated."""

ALLOWED = {
    "core": set(),
    "errors": {"core"},
    "dsl": {"core", "errors"},
    "global_sched": {"core", "errors"},
    "runtime_ext": {"core", "errors", "sim"},
    "profiles": {"errors", "global_sched", "sim"},
    "predict": {"core", "dsl", "global_sched"},
    "sim": {"core", "errors", "dsl", "global_sched", "profiles"},
    "machine": {"core", "errors", "global_sched", "runtime_ext", "predict", "profiles"},
    "opening": {"errors"},
    "openai_backend": {"core", "errors", "dsl", "opening"},
    "fleet_file": {"core", "errors", "machine", "runtime_ext", "sim"},
    "answering": {"core"},
    "breaker": {"core"},
    "attempts": {"core", "answering", "runtime_ext"},
    "dispatcher": {
        *("core", "errors", "answering", "attempts", "breaker", "global_sched", "runtime_ext", "sim"),
    },
    "draining": {"core", "errors", "dispatcher"},
    "feeds": {"core", "errors", "global_sched", "runtime_ext"},
    "remote_fleet": {"core", "errors", "dsl", "answering", "opening", "runtime_ext"},
    "fleet": {
        *("core", "errors", "dsl", "global_sched", "runtime_ext", "profiles", "predict", "machine"),
        *("opening", "attempts", "dispatcher", "draining", "feeds", "fleet_file", "remote_fleet"),
    },
    "control": {"core", "errors", "fleet", "runtime_ext"},
    "server": {"core", "errors", "dsl", "global_sched", "runtime_ext", "attempts", "fleet", "__init__"},
    "commands": {
        *("core", "errors", "dsl", "global_sched", "runtime_ext", "predict", "profiles", "sim", "machine"),
        *("fleet", "fleet_file", "opening", "control", "server", "__init__"),
    },
    "cli": {"errors", "commands", "control", "fleet", "fleet_file", "machine", "opening"},
    "__init__": {"errors", "dsl", "fleet", "openai_backend", "runtime_ext"},
}
PURE = ["core.py", "errors.py", "predict.py", "dsl/ops.py", "global_sched", "profiles", "sim"]
VIRTUAL = {"virtual_loop.py", "programs.py"}
"""Programs are coroutines: these use asyncio, on a loop whose time is virtual."""

IMPURE = {"asyncio", "threading", "time", "socket", "datetime", "subprocess", "torch", "sglang", "aiohttp"}


def files(part: str) -> list[Path]:
    path = PACKAGE / part
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [file for file in found if "cpu_stubs" not in file.parts]


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of every module that a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def part_of(module: str) -> str | None:
    """Return the top-level part of this package that a module belongs to."""
    names = module.split(".")
    if names[0] != "preble_sgl":
        return None
    return names[1] if len(names) > 1 else "__init__"


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_import_only_what_the_drawing_in_the_architecture_allows(part: str) -> None:
    name = part if (PACKAGE / part).is_dir() else f"{part}.py"
    for file in files(name):
        for module in imports(file):
            imported = part_of(module)
            if imported is not None and imported != part:
                assert imported in ALLOWED[part], f"{file} imports {module}"


def test_every_part_has_its_rule() -> None:
    parts = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts == set(ALLOWED)


def test_the_engine_model_stands_alone_and_is_all_that_runtimes_see_of_the_simulator() -> None:
    allowed = {f"preble_sgl.sim.{name}" for name in ENGINE_MODEL}
    for file in [PACKAGE / "sim" / f"{name}.py" for name in ENGINE_MODEL]:
        for module in imports(file):
            assert part_of(module) in (None, "core", "errors") or module in allowed, (
                f"{file} imports {module}"
            )
    for file in [*files("runtime_ext"), *files("profiles")]:
        for module in imports(file):
            assert part_of(module) != "sim" or module in allowed, f"{file} imports {module}"


@pytest.mark.parametrize("part", PURE)
def test_the_pure_zone_has_no_clock_no_threads_and_no_sockets(part: str) -> None:
    for file in files(part):
        impure = {module.split(".")[0] for module in imports(file)} & IMPURE
        assert impure <= ({"asyncio"} if file.name in VIRTUAL else set()), f"{file} imports {impure}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'numpy', 'aiohttp'}"
    code = f"import sys, preble_sgl; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_what_the_package_offers_is_what_it_lists() -> None:
    for name in preble_sgl.__all__:
        assert getattr(preble_sgl, name).__doc__
