"""How much of what programs reuse is known before they run: SGLang's frontend rule against a plan.

    python -m benchmarks.experiments.frontend_analysis [--rows 32] [--out FILE]

The programs of `programs/` on rows of their test stories, each row made different from the others, with the
scripted model of the story and one cache that never forgets; counts are tokens of the small default model's
tokenizer. SGLang's frontend finds one thing before a batch runs: the literal text up to the first argument,
if it is longer than 64 characters and there is more than one row. The rule is applied to the same programs;
it is not a run of SGLang. A plan has a lower and an upper bound, both given as shares of what was served.
"""

import asyncio
import platform
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rows import write_rows
from preble_sgl.core import common_prefix_len
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.scripted import ScriptedBackend
from preble_sgl.machine import default_model
from tests.programs.test_programs import NAMES, story

RESULT = Path("benchmarks/results/frontend_analysis")
LEAST_CHARS = 64
"""SGLang computes a common prefix ahead only if it is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One program: what was served, and how much of the reuse each way of reading knew. Shares are 0 to 1."""

    program: str
    rows: int
    calls: int
    prompt_tokens: int
    reused_tokens: int
    reuse_rate: float
    sglang_rule: float
    plan_lower: float
    plan_upper: float
    readings: int


def different(row: dict[str, Any], i: int) -> dict[str, Any]:
    """Return a row with something in it that no other row has: in a text, in a list of texts, or its seed."""
    for name, value in row.items():
        if isinstance(value, str):
            return row | {name: f"{value} (Case {i}.)"}
        if isinstance(value, list) and isinstance(value[0], str):
            return row | {name: [f"{value[0]} (Case {i}.)", *value[1:]]}
    return row | {"seed": i}


def literal_len(plan: Plan, chat: ChatFormat) -> int:
    """Return the tokens of the first call's text that comes before the first argument in every row."""
    prompts = [trace.readings[0].calls[0].request.prompt for trace in plan.traces]
    first = prompts[0].tobytes()
    length = min(common_prefix_len(first, prompt.tobytes()) for prompt in prompts[1:])
    return length if len(chat.decode(prompts[0][:length])) > LEAST_CHARS else 0


async def measure(name: str, num_rows: int, chat: ChatFormat) -> Known:
    """Plan and run one program."""
    told = story(name)
    rows = [different(told.ROWS[i % len(told.ROWS)], i) for i in range(num_rows)]
    backend = ScriptedBackend(told.answers, chat=chat)
    plan = await told.PROGRAM.aplan(rows, fleet=backend)
    batch = await told.PROGRAM.amap(rows, fleet=backend, plan=plan, progress=False)
    assert not batch.errors, batch.errors[0]
    usage, reusable = batch.usage, plan.bounds.reusable_tokens
    assert reusable.upper is not None
    assert usage.cached_tokens in reusable, (name, usage, reusable)
    return Known(
        program=name,
        rows=num_rows,
        calls=sum(result.num_calls for result in batch),
        prompt_tokens=usage.prompt_tokens,
        reused_tokens=usage.cached_tokens,
        reuse_rate=round(usage.cached_tokens / usage.prompt_tokens, 4),
        sglang_rule=round(literal_len(plan, chat) * (num_rows - 1) / usage.cached_tokens, 4),
        plan_lower=round(reusable.lower / usage.cached_tokens, 4),
        plan_upper=round(reusable.upper / usage.cached_tokens, 4),
        readings=max(len(trace.readings) for trace in plan.traces),
    )


def shown(found: list[Known]) -> Table:
    """Return the results as a table."""
    table = Table(title="Known before the run, as a share of what is reused")
    table.add_column("program")
    for column in ("calls", "prompt tokens", "reused", "SGLang's rule", "plan: at least", "at most"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(one.program, *_cells(one))
    return table


def _cells(one: Known) -> Iterator[str]:
    yield from (f"{one.calls:,}", f"{one.prompt_tokens:,}", f"{one.reuse_rate:.1%}")
    yield from (f"{share:.1%}" for share in (one.sglang_rule, one.plan_lower, one.plan_upper))


def main(
    rows: Annotated[int, typer.Option(min=2, help="Rows of each program.")] = 32,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    chat = ChatFormat.load(default_model())
    found = [asyncio.run(measure(name, rows, chat)) for name in NAMES]
    Console(width=120).print(shown(found))
    about = {
        "label": "scripted model, one cache that never forgets; tokens are counted",
        "command": f"python -m benchmarks.experiments.frontend_analysis --rows {rows}",
        "machine": f"Python {platform.python_version()}",
    }
    write_rows(out.with_suffix(".json"), about, Known, map(astuple, found))
    print(orjson.dumps(about | {"rows": [asdict(one) for one in found]}).decode())


if __name__ == "__main__":
    typer.run(main)
