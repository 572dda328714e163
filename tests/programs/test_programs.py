"""Every program: its golden output, and what its plan says against what is served."""

import asyncio
import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic_core import to_json

import preble_sgl as ps
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan
from tests.programs import stories

NAMES = [module.name for module in pkgutil.iter_modules(stories.__path__)]
GOLDEN = Path(__file__).parent / "golden"
PROGRAMS = Path(__file__).parents[2] / "programs"


def story(name: str) -> ModuleType:
    """Return a program's story."""
    return importlib.import_module(f"tests.programs.stories.{name}")


async def played(told: ModuleType, chat: ChatFormat | None = None) -> tuple[Plan, ps.Batch[Any]]:
    """Plan and run a story."""
    backend = ps.ScriptedBackend(told.answers, chat=chat)
    plan = await told.PROGRAM.aplan(told.ROWS, fleet=backend)
    return plan, await told.PROGRAM.amap(told.ROWS, fleet=backend, plan=plan, progress=False)


async def golden_text(name: str) -> str:
    """Return what a program makes of its story: values and counts of each row, and the plan."""
    plan, batch = await played(story(name))
    lines = []
    for result in batch:
        usage = result.usage
        tokens = f"{usage.prompt_tokens} prompt, {usage.cached_tokens} cached tokens"
        value = to_json(result.value, fallback=str).decode() if result.ok else repr(result.error)
        lines.append(f"row {result.index}: {result.num_calls} calls, {tokens}\n{value}")
    return "\n".join([*lines, "", plan.explain(), "", str(plan.diff(batch)), ""])


def test_every_program_has_a_story() -> None:
    assert sorted(NAMES) == sorted(p.stem for p in PROGRAMS.glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
async def test_the_output_is_the_golden_one(name: str) -> None:
    told = await golden_text(name)
    golden = (GOLDEN / f"{name}.txt").read_text()
    difference = "\n".join(difflib.unified_diff(golden.splitlines(), told.splitlines(), lineterm=""))
    assert told == golden, f"python -m tests.programs.test_programs writes it anew:\n{difference}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", ["bytes", "model"])
async def test_what_is_served_lies_within_what_was_planned(name: str, tokens: str, chat: ChatFormat) -> None:
    told = story(name)
    plan, batch = await played(told, chat if tokens == "model" else None)
    assert batch.errors == []
    assert plan.warnings == ()
    assert plan.lint() == ()
    difference = plan.diff(batch)
    assert difference.is_within, str(difference)
    assert plan.bounds.calls.upper is not None
    if told.STATIC:
        assert plan.bounds.calls.lower == plan.bounds.calls.upper == sum(r.num_calls for r in batch)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_is_short_and_says_what_a_row_is(name: str) -> None:
    text = (PROGRAMS / f"{name}.py").read_text()
    assert "A row: {" in text
    assert len(text.splitlines()) < 130


if __name__ == "__main__":
    for each in NAMES:
        (GOLDEN / f"{each}.txt").write_text(asyncio.run(golden_text(each)))
