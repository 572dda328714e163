"""`preble-sgl demo`: two programs over real text, placed by E2 and then by round robin, side by side."""

import sysconfig
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from preble_sgl.commands.program_file import load_program, shipped_program
from preble_sgl.core import ProgramId, RequestRecord, Usage, WorkerId
from preble_sgl.dsl.batch import Row
from preble_sgl.dsl.program import Program
from preble_sgl.fleet import Fleet

POLICIES = ("preble_e2", "round_robin")
MODULES = ("bisect", "fnmatch", "graphlib", "linecache", "queue", "reprlib", "sched", "textwrap")
DOCUMENT_CHARS = 6000
QUESTIONS = (
    "Which function would a user call first?",
    "What happens when the input is empty?",
    "Which errors does it raise, and when?",
    "What is its time complexity?",
    "Is it safe to use from several threads?",
)
DIMENSIONS = ("naming", "error handling", "simplicity", "documentation")


@dataclass(frozen=True, slots=True)
class Job:
    """A program and the rows to run it on."""

    program: Program[Any, Any]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy made of all jobs."""

    records: tuple[RequestRecord, ...]
    wall_s: float

    @property
    def usage(self) -> Usage:
        return sum((record.usage for record in self.records), Usage())

    @property
    def mean_program_s(self) -> float:
        """Mean time from a program run's first call to the end of its last, in seconds."""
        runs: dict[ProgramId, list[RequestRecord]] = defaultdict(list)
        for record in self.records:
            runs[record.program_id].append(record)
        spans = [max(r.finished_at for r in run) - min(r.submitted_at for r in run) for run in runs.values()]
        return mean(spans)

    def as_json(self) -> dict[str, float]:
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "computed_tokens": usage.computed_tokens,
            "wall_s": round(self.wall_s, 3),
        }


async def run_demo(model_path: Path | None, runtimes: int | None) -> None:
    """Print the plans, run them under both policies, compare; the last line is JSON."""
    console = Console()
    jobs = demo_jobs()
    console.print("starting the runtimes …")
    async with Fleet.launch(model_path, runtimes=runtimes) as fleet:
        predicted = await explain_jobs(fleet, jobs, console)
        outcomes = {}
        for policy in POLICIES:
            await fleet.flush_cache()
            outcomes[policy] = await run_jobs(fleet, jobs, policy)
            console.print(_per_runtime(policy, outcomes[policy], fleet.worker_ids))
    console.print(_side_by_side(outcomes, predicted))
    summary = {policy: outcome.as_json() for policy, outcome in outcomes.items()}
    print(orjson.dumps(summary | {"predicted_cached_tokens": predicted}).decode())


def demo_jobs() -> list[Job]:
    """Return the demo's programs with rows made of the standard library's source files."""
    documents = [_source(name) for name in MODULES]
    qa = [{"document": document, "questions": list(QUESTIONS)} for document in documents]
    reviews = [{"article": document, "dimensions": list(DIMENSIONS)} for document in documents]
    return [
        Job(load_program(str(shipped_program("document_qa"))), qa),
        Job(load_program(str(shipped_program("judge"))), reviews),
    ]


async def explain_jobs(fleet: Fleet, jobs: Sequence[Job], console: Console | None = None) -> int:
    """Print each job's plan and return how many prompt tokens they are predicted to reuse together."""
    predicted = 0
    for job in jobs:
        plan = await job.program.aplan(job.rows, fleet=fleet)
        predicted += fleet.predict(plan).cached_tokens
        if console:
            console.print(plan.explain(), highlight=False, soft_wrap=True)
            console.print()
    return predicted


async def run_jobs(fleet: Fleet, jobs: Sequence[Job], policy: str, *, progress: bool = True) -> Outcome:
    """Run the jobs one after the other under `policy`. Raises the first row's error if one fails."""
    records: list[RequestRecord] = []
    placed = fleet.with_policy(policy, on_record=records.append)
    plans = [await job.program.aplan(job.rows, fleet=fleet) for job in jobs]
    started_at = time.monotonic()
    for job, plan in zip(jobs, plans, strict=True):
        batch = await job.program.amap(job.rows, fleet=placed, plan=plan, progress=progress)
        assert len(batch.values) == len(job.rows)
    return Outcome(tuple(records), time.monotonic() - started_at)


def _source(module: str) -> str:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    return path.read_text()[:DOCUMENT_CHARS]


def _per_runtime(policy: str, outcome: Outcome, worker_ids: Sequence[WorkerId]) -> Table:
    table = _table(
        f"{policy}: as SGLang reports it", "runtime", "calls", "prompt tokens", "cached tokens", "hit rate"
    )
    by_worker: dict[WorkerId, list[RequestRecord]] = defaultdict(list)
    for record in outcome.records:
        by_worker[record.worker_id].append(record)
    for worker_id in worker_ids:
        usage = sum((record.usage for record in by_worker[worker_id]), Usage())
        cells = (f"{len(by_worker[worker_id])}", f"{usage.prompt_tokens:,}", f"{usage.cached_tokens:,}")
        table.add_row(worker_id, *cells, _hit_rate(usage))
    return table


def _side_by_side(outcomes: dict[str, Outcome], predicted: int) -> Table:
    table = _table(
        "side by side",
        "policy",
        "computed prompt tokens",
        "cached tokens",
        "predicted",
        "hit rate",
        "wall time",
    )
    for policy, outcome in outcomes.items():
        usage = outcome.usage
        cells = (f"{usage.computed_tokens:,}", f"{usage.cached_tokens:,}")
        expected = f"{predicted:,}" if policy == POLICIES[0] else ""
        table.add_row(policy, *cells, expected, _hit_rate(usage), f"{outcome.wall_s:.1f} s")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _hit_rate(usage: Usage) -> str:
    return f"{usage.cached_tokens / max(1, usage.prompt_tokens):.0%}"
