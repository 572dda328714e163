"""Preble's figure 5, simulated: what each part of E2 adds, ToolBench by Zipf 1.1 on four A6000.

    python -m benchmarks.experiments.preble_figure5 [--quick] [--seeds 3] [--jobs 2] [--out FILE]

400 prefixes and 300 s of Poisson arrivals; 36 requests per second, as in the paper, are 10,800 requests.
Other rates are added because the simulated A6000 saturates elsewhere. Each rung of the ladder keeps what is
below it; the last changes the local scheduler, so that a control with it under round robin is there too.
`--quick`: one seed, two rates, a fifth of the time; it writes nothing unless --out says where.
"""

import random
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from benchmarks.rows import BASE, Cell, Row, Study, about, cells, conclude, mean, ratio, side_by_side, spread
from preble_sgl.global_sched.policies.preble_e2 import PrebleE2
from preble_sgl.global_sched.policies.protocol import Policy
from preble_sgl.global_sched.policies.round_robin import RoundRobin
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import OpenLoop
from preble_sgl.sim.report import summarise
from preble_sgl.sim.simulator import SimulatedFleet, SimWorker
from preble_sgl.sim.virtual_time import VirtualTime
from preble_sgl.sim.wait_queue import WaitOrder

RESULT = Path("benchmarks/results/preble_figure5")
PROFILE = "a6000-mistral-7b"
WORKERS = 4
RATES = (24.0, 30.0, 36.0, 42.0, 48.0)
PAPER_RATE = 36.0
DURATION_S = 300.0


class Rung(NamedTuple):
    """A step of the ladder: how to place, and in which order a runtime takes what waits."""

    policy: Callable[[], Policy]
    order: WaitOrder = "lpm"


LADDER: Mapping[str, Rung] = {
    BASE: Rung(RoundRobin),
    "+ E2": Rung(lambda: PrebleE2(rebalance=False, replicate=False, balance=False)),
    "+ rebalance, replicate": Rung(lambda: PrebleE2(balance=False)),
    "+ prefill/decode balance": Rung(PrebleE2),
    "+ priority groups": Rung(PrebleE2, "preble_groups"),
    "round_robin, priority groups": Rung(RoundRobin, "preble_groups"),
}


class Run(NamedTuple):
    """One point to simulate."""

    rung: str
    rps: float
    seed: int
    duration_s: float


def simulate(run: Run) -> Row:
    """Return what comes of a run."""
    rung = LADDER[run.rung]
    worker = SimWorker.of("", load_profile(PROFILE), order=rung.order)
    scheduler = GlobalScheduler(rung.policy(), rng=random.Random(run.seed))
    clock = VirtualTime()
    fleet = SimulatedFleet(scheduler, [worker.named(f"gpu{i}") for i in range(WORKERS)], clock)
    load = Load(workload="toolbench", rps=run.rps, duration_s=run.duration_s, scale_gpus=WORKERS, zipf=1.1)
    sessions, arrivals = load.play(run.seed)
    loop = OpenLoop(fleet, clock, islice(sessions, load.num_requests), arrivals)
    loop.begin()
    clock.run()
    return Row.of(
        summarise(loop.records, loop.num_failed, fleet.busy_s),
        hardware="4xa6000",
        workload="toolbench",
        variant="ladder",
        rps=run.rps,
        policy=run.rung,
        seed=run.seed,
    )


def table(study: Study) -> Table:
    """Return the ladder at each rate, with the range over seeds."""
    shown = Table(title="simulated: ToolBench, Zipf 1.1, 400 prefixes, 4 × A6000")
    for column in ("req/s", "", "mean, s", "round robin /", "p99, s", "round robin /", "hit rate"):
        shown.add_column(column)
    for cell, rungs in cells(study.rows).items():
        for rung, rows in rungs.items():
            latency: list[str] = []
            for metric in ("mean_s", "p99_s"):
                latency.append(f"{mean(rows, metric):.2f} ± {spread(rows, metric):.2f}")
                latency.append(f"{ratio(rungs[BASE], rows, metric):.2f}")
            shown.add_row(f"{cell.rps:g}", rung, *latency, f"{mean(rows, 'hit_rate'):.1%}")
    return shown


def headline(study: Study) -> dict[str, dict[str, float]]:
    """Return round robin over each rung at the paper's rate."""
    rungs = cells(study.rows)[Cell("4xa6000", "toolbench", "ladder", PAPER_RATE)]
    return {
        rung: {metric: round(ratio(rungs[BASE], rows, metric), 2) for metric in ("mean_s", "p99_s")}
        for rung, rows in rungs.items()
    }


def main(
    quick: Annotated[bool, typer.Option(help="One seed, two rates, a fifth of the time.")] = False,
    seeds: Annotated[int, typer.Option()] = 3,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where .json goes.")] = None,
) -> None:
    """Simulate, print and keep the result."""
    began_at = perf_counter()
    seeds, rates, share = (1, (PAPER_RATE, RATES[-1]), 0.2) if quick else (seeds, RATES, 1.0)
    runs = [
        Run(rung, rps, seed, share * DURATION_S) for rps in rates for rung in LADDER for seed in range(seeds)
    ]
    command = "preble_figure5" + " --quick" * quick
    facts = about(command, [load_profile(PROFILE)], quick=quick, seeds=seeds, duration_s=share * DURATION_S)
    study = Study(facts, side_by_side(simulate, runs, jobs))
    last_line = {"label": "simulated", "headline": headline(study)}
    kept = out or (None if quick else RESULT)
    conclude(study, table(study), last_line, began_at=began_at, jobs=jobs, out=kept)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
