"""Batches on two real runtimes of which one after the other is killed: is every row there, once and whole?

    python -m benchmarks.experiments.kills [--kills 20] [--seed 0] [--out FILE]

Batches of streamed calls run without a pause while SIGKILL hits a runtime, chosen at random, at random
moments; the supervisor starts it again. Two in three calls are plain and go on elsewhere with the tokens that
they have; the third has a grammar and is repeated. Counted: answers that differ from those without faults,
streams with a token twice or missing, answers that had to begin anew, and how long the supervisor took.
Real SGLang on a CPU with a small random-weight model: what is proven is correctness, not speed.
"""

import asyncio
import platform
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.core import Completion, RequestRecord, WorkerId
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.supervisor import Watching
from tests.faults.batches import Streamed, batch, run_batch, server_of

RESULT = Path("benchmarks/results/kills")
CALLS = 24
OUTPUT_LEN = 150
MEAN_GAP_S = 4.0
WATCHING = Watching(poll_s=0.2, timeout_s=2.0, backoff_s=0.1)


@dataclass
class Tally:
    """What came of the calls."""

    rows: int = 0
    wrong_answers: int = 0
    wrong_streams: int = 0
    begun_anew: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    batch_s: list[float] = field(default_factory=list)
    down_s: list[float] = field(default_factory=list)

    def count(self, answers: Sequence[tuple[Completion, Streamed]], expected: Sequence[Completion]) -> None:
        """Compare a batch with the one without faults."""
        for (completion, streamed), wanted in zip(answers, expected, strict=True):
            self.rows += 1
            self.wrong_answers += completion.output_ids != wanted.output_ids or completion.text != wanted.text
            last = max(streamed.ids)
            self.begun_anew += last > 0
            is_whole = streamed.ids[last] == completion.output_ids and streamed.text[last] == completion.text
            self.wrong_streams += not is_whole


async def kill(fleet: Fleet, rng: random.Random, num_kills: int, tally: Tally) -> None:
    """Kill runtimes at random moments, as soon as there is one to kill."""
    returns = []
    for _ in range(num_kills):
        await asyncio.sleep(rng.expovariate(1 / MEAN_GAP_S))
        while not fleet.worker_ids:
            await asyncio.sleep(0.05)
        victim = rng.choice(fleet.worker_ids)
        server_of(fleet, victim).kill()
        while victim in fleet.worker_ids:
            await asyncio.sleep(0.01)
        returns.append(asyncio.create_task(measure_return(fleet, victim, tally)))
    await asyncio.gather(*returns)


async def measure_return(fleet: Fleet, worker_id: WorkerId, tally: Tally) -> None:
    """Note how long a worker is away."""
    lost_at = perf_counter()
    while worker_id not in fleet.worker_ids:
        await asyncio.sleep(0.05)
    tally.down_s.append(perf_counter() - lost_at)


async def run(num_kills: int, seed: int) -> dict[str, Any]:
    """Run batches until the last kill is over; return what is to be kept."""
    records: list[RequestRecord] = []
    tally = Tally()
    async with Fleet.launch(runtimes=2, watching=WATCHING) as fleet:
        started_at = perf_counter()
        expected = [completion for completion, _ in await run_batch(fleet, batch(CALLS, OUTPUT_LEN))]
        calm_s = perf_counter() - started_at
        fleet.on_record(records.append)
        killing = asyncio.create_task(kill(fleet, random.Random(seed), num_kills, tally))
        while not killing.done():
            started_at = perf_counter()
            tally.count(await run_batch(fleet, batch(CALLS, OUTPUT_LEN)), expected)
            tally.batch_s.append(perf_counter() - started_at)
        await killing
        fleet.scheduler.check_invariants()
    tally.attempts = Counter(record.num_attempts for record in records)
    return {
        "kills": num_kills,
        "batches": len(tally.batch_s),
        "rows": tally.rows,
        "records": len(records),
        "wrong_answers": tally.wrong_answers,
        "wrong_streams": tally.wrong_streams,
        "begun_anew": tally.begun_anew,
        "calls_by_attempts": {str(number): count for number, count in sorted(tally.attempts.items())},
        "calm_batch_s": calm_s,
        "batch_s": tally.batch_s,
        "down_s": tally.down_s,
    }


def show(result: dict[str, Any]) -> None:
    """Print what matters."""
    table = Table(title=f"{result['kills']} kills in {result['batches']} batches of {CALLS} streamed calls")
    for column in ("what", "figure"):
        table.add_column(column)
    for name in ("rows", "records", "wrong_answers", "wrong_streams", "begun_anew", "calls_by_attempts"):
        table.add_row(name.replace("_", " "), str(result[name]))
    for name in ("batch_s", "down_s"):
        values = result[name]
        spread = f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        table.add_row(f"{name}, median (range)", spread)
    Console(width=110).print(table)


def main(
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    result = asyncio.run(run(kills, seed)) | {
        "machine": f"2 cores, {platform.machine()}, Python {platform.python_version()}, SGLang on CPU",
        "command": f"python -m benchmarks.experiments.kills --kills {kills} --seed {seed}",
    }
    show(result)
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    typer.run(main)
