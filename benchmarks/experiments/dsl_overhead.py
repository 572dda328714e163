"""What the DSL itself costs: 1,000 rows of eight forks on the scripted backend, and plans of many rows.

    python -m benchmarks.experiments.dsl_overhead [--rows 1000] [--rounds 3] [--out FILE]

*Run*: every row forks eight branches of one call each, all rows at once, so that up to 8,000 calls are under
way. The scripted backend answers at once; its own time (tokenising answers, searching its cache) is measured
with the same requests and no program, in the same round, and both are given. Memory is the growth of the
process's resident set at its highest; threads are counted while the rows run. *Plan*: a few-shot program over
10,000 rows, read with the small default model's tokenizer.
"""

import asyncio
import gc
import platform
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

import preble_sgl as ps
from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.machine import default_model

RESULT = Path("benchmarks/results/dsl_overhead")
FORKS = 8
PLANNED_ROWS = 10_000
SHOTS = ps.few_shot(
    [(f"What is {i} plus {i}? " * 4, f"It is {2 * i}.") for i in range(8)],
    lambda shot: ps.user(shot[0]) + ps.assistant(shot[1]),
)


@ps.program
async def fan_out(s: ps.State, text: str) -> list[str]:
    """Ask eight things about a text."""
    s += ps.system("You answer questions.") + ps.user(text)
    return await s.map(range(FORKS), lambda branch, i: branch.ask(ps.user(f"Question {i}?"), max_tokens=8))


@ps.program
async def few_shot(s: ps.State, question: str) -> str:
    """Answer after eight examples."""
    s += ps.system("You calculate.")
    s += SHOTS
    return await s.ask(ps.user(question), max_tokens=8)


def run(num_rows: int, chat: ChatFormat) -> dict[str, Any]:
    """Run the rows once; return seconds per call with and without the backend's own, memory and threads."""
    backend = ps.ScriptedBackend({"*": "an answer"}, chat=chat)
    rows = [{"text": f"Text {i}. " * 10} for i in range(num_rows)]
    gc.collect()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_threads = 0

    def watch(_: object) -> None:
        nonlocal num_threads
        num_threads = max(num_threads, threading.active_count())

    run_s, batch = timed(
        lambda: asyncio.run(
            fan_out.amap(rows, fleet=backend, progress=False, concurrency=num_rows, on_row=watch)
        )
    )
    num_calls = sum(result.num_calls for result in batch)
    memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    again = ps.ScriptedBackend({"*": "an answer"}, chat=chat)

    async def ask_all() -> None:
        await asyncio.gather(*(again.generate(request) for request in backend.requests))

    backend_s, _ = timed(lambda: asyncio.run(ask_all()))
    return {
        "calls": num_calls,
        "us_per_call": 1e6 * run_s / num_calls,
        "backend_us_per_call": 1e6 * backend_s / num_calls,
        "memory_mib": memory_kib / 1024,
        "threads": num_threads,
    }


def plan(chat: ChatFormat) -> float:
    """Return the seconds that reading all rows takes."""
    rows = [{"question": f"What is {i} plus {i + 1}?"} for i in range(PLANNED_ROWS)]
    gc.collect()
    seconds, made = timed(lambda: asyncio.run(few_shot.aplan(rows, fleet=chat)))
    assert len(made.calls) == PLANNED_ROWS
    return seconds


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long `work` takes, in seconds, and what it returns."""
    started_at = perf_counter()
    result = work()
    return perf_counter() - started_at, result


def spread(values: list[float]) -> str:
    """Return median and range."""
    return f"{median(values):,.2f} ({min(values):,.2f}–{max(values):,.2f})"


def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch that runs.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    gc.set_threshold(*GC_THRESHOLDS)
    chat = ChatFormat.load(default_model())
    runs, plans = [], []
    for _ in range(rounds):
        runs.append(run(rows, chat))
        plans.append(plan(chat))
    table = Table(
        title=f"{rows:,} rows × {FORKS} forks on the scripted backend; a plan of {PLANNED_ROWS:,} rows"
    )
    for column in ("what", "median (range)"):
        table.add_column(column)
    for name in ("us_per_call", "backend_us_per_call", "memory_mib", "threads"):
        table.add_row(name, spread([one[name] for one in runs]))
    table.add_row("plan_s", spread(plans))
    Console(width=110).print(table)
    result = {
        "runs": runs,
        "plan_s": plans,
        "rows": rows,
        "forks": FORKS,
        "planned_rows": PLANNED_ROWS,
        "machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
        "command": f"python -m benchmarks.experiments.dsl_overhead --rows {rows} --rounds {rounds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    typer.run(main)
