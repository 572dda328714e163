"""The orders of the wait queue inside the runtimes, simulated: which pays, and for whom.

    python -m benchmarks.experiments.wait_orders [--seeds 3] [--out FILE]

Four workers of 30,000 KV tokens under E2 placement, at rates at which requests queue. All orders see the same
sessions and arrivals; the expected output of a request is its real one with an error (log-normal, sigma
0.5), as a profile of call sites would give it. **Simulated**: A6000 with Mistral-7B.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, get_args

import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.core import Request, TokenIds
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import OpenLoop, Setting
from preble_sgl.sim.report import Summary, summarise
from preble_sgl.sim.simulator import OnEnd, SimulatedFleet
from preble_sgl.sim.virtual_time import VirtualTime
from preble_sgl.sim.wait_queue import WaitOrder
from preble_sgl.sim.workloads import Session

RESULT = Path("benchmarks/results/wait_orders")
PROFILE = "a6000-mistral-7b"
WORKERS = 4
LOADS = (("toolbench", 40.0), ("azure_conv", 24.0), ("apps", 40.0))
ORDERS: tuple[WaitOrder, ...] = get_args(WaitOrder)
FIGURES = ("mean_e2e_s", "p99_e2e_s", "mean_ttft_s", "mean_program_s")
SIGMA = 0.5
KV_TOKENS = 30_000


class Guessed(SimulatedFleet):
    """A fleet whose requests say how long an answer they expect, with an error."""

    rng: random.Random

    def submit(self, request: Request, output: TokenIds, on_end: OnEnd) -> None:
        """Add the guess."""
        guess = max(1, round(len(output) * self.rng.lognormvariate(0.0, SIGMA)))
        super().submit(replace(request, expected_output_len=guess), output, on_end)


def play(workload: str, rps: float, order: WaitOrder, seed: int) -> Summary:
    """Simulate once."""
    clock = VirtualTime()
    load = Load(workload=workload, rps=rps, duration_s=60)
    sessions, arrivals = load.play(seed)
    setting = Setting(
        policy="preble_e2",
        gpus=WORKERS,
        profile=load_profile(PROFILE),
        seed=seed,
        order=order,
        kv_tokens=KV_TOKENS,
    )
    fleet = setting.fleet(clock)
    fleet.__class__ = Guessed
    assert isinstance(fleet, Guessed)
    fleet.rng = random.Random(seed)
    loop = OpenLoop(fleet, clock, _first(sessions, load.num_requests), arrivals)
    loop.begin()
    clock.run()
    return summarise(loop.records, loop.num_failed, fleet.busy_s)


def _first(sessions: Iterator[Session], num_requests: int) -> Iterator[Session]:
    num_turns = 0
    for session in sessions:
        if num_turns >= num_requests:
            return
        num_turns += len(session.turns)
        yield session


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Simulate, print and keep the result."""
    table = Table(title=f"Wait-queue orders, simulated, ratio to lpm over {seeds} seeds (below 1 is better)")
    for column in ("workload", "order", *(name.removesuffix("_s").replace("_", " ") for name in FIGURES)):
        table.add_column(column)
    cases: list[dict[str, Any]] = []
    for workload, rps in LOADS:
        runs = {order: [play(workload, rps, order, seed) for seed in range(seeds)] for order in ORDERS}
        for order in ORDERS:
            case: dict[str, Any] = {"workload": workload, "rps": rps, "order": order}
            shown = []
            for name in FIGURES:
                values = [getattr(run, name) for run in runs[order]]
                each = [v / getattr(base, name) for v, base in zip(values, runs["lpm"], strict=True)]
                spread = stdev(each) if seeds > 1 else 0.0
                case[name] = {"values": values, "ratio_to_lpm": fmean(each), "sd": spread}
                shown.append(f"{fmean(each):.2f} ±{spread:.2f}")
            cases.append(case)
            table.add_row(f"{workload} {rps:g}/s", order, *shown)
    Console(width=110).print(table)
    result = {
        "simulated": True,
        "profile": PROFILE,
        "workers": WORKERS,
        "seeds": seeds,
        "cases": cases,
        "command": f"python -m benchmarks.experiments.wait_orders --seeds {seeds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    typer.run(main)
