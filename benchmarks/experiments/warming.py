"""Do warm-ups pay? Simulated fleets in which workers restart, and fleets in which nothing happens.

    python -m benchmarks.experiments.warming [--seeds 5] [--out FILE]

*restarts*: every 30 s one of four workers is lost and is back 5 s later with an empty cache; counted are the
requests submitted in the 20 s after its return. *calm*: nothing happens; all requests are counted. With
warm-ups the scheduler is asked for proposals five times a second, without them never; arrivals, seeds and
everything else are the same. Runtimes tell of their caches. Policies: E2 and preble_plan. **Simulated**:
A6000 with Mistral-7B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.core import RequestRecord, WorkerId
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import OpenLoop, Setting
from preble_sgl.sim.report import percentile
from preble_sgl.sim.virtual_time import VirtualTime

RESULT = Path("benchmarks/results/warming")
PROFILE = "a6000-mistral-7b"
WORKERS = 4
LOADS = (("toolbench", 6.0), ("apps", 6.0), ("videoqa", 1.2))
POLICIES = ("preble_e2", "preble_plan")
DURATION_S = 150
FIRST_S, EVERY_S, DOWN_S, AFTER_S = 20, 30, 5.0, 20.0
ASK_EVERY_S = 0.2


@dataclass
class Run:
    """One simulated run; `returns`: the instants at which a worker came back."""

    records: Sequence[RequestRecord]
    returns: list[float] = field(default_factory=list)
    num_warm_ups: int = 0

    def counted(self) -> list[RequestRecord]:
        """Return the requests that the figures are of."""
        if not self.returns:
            return list(self.records)
        return [r for r in self.records if any(0 <= r.submitted_at - at < AFTER_S for at in self.returns)]

    def figures(self) -> dict[str, float]:
        """Return the aggregate."""
        counted = self.counted()
        ttft = sorted(r.first_token_at - r.submitted_at for r in counted)
        e2e = sorted(r.finished_at - r.submitted_at for r in counted)
        return {
            "mean_ttft_s": fmean(ttft),
            "p99_ttft_s": percentile(ttft, 0.99),
            "mean_e2e_s": fmean(e2e),
            "computed_tokens": sum(r.usage.computed_tokens for r in counted),
            "warm_ups": self.num_warm_ups,
        }


def play(workload: str, rps: float, policy: str, seed: int, *, restarts: bool, warm: bool) -> Run:
    """Simulate once."""
    clock = VirtualTime()
    load = Load(workload=workload, rps=rps, duration_s=DURATION_S)
    sessions, arrivals = load.play(seed)
    setting = Setting(
        policy=policy, gpus=WORKERS, profile=load_profile(PROFILE), seed=seed, cache_events=True
    )
    turns = 0

    def enough() -> Any:
        nonlocal turns
        for session in sessions:
            if turns >= load.num_requests:
                return
            turns += len(session.turns)
            yield session

    loop = OpenLoop(setting.fleet(clock), clock, enough(), arrivals)
    loop.begin()
    run = Run(loop.records)
    if restarts:
        for number, at in enumerate(range(FIRST_S, DURATION_S - EVERY_S, EVERY_S)):
            worker_id = WorkerId(f"gpu{number % WORKERS:03d}")
            clock.call_at(float(at), loop.fleet.restart, worker_id, DOWN_S)
            run.returns.append(at + DOWN_S)
    if warm:
        propose = loop.fleet.scheduler.warming.propose

        def counting() -> Any:
            found = propose()
            run.num_warm_ups += len(found)
            return found

        loop.fleet.scheduler.warming.propose = counting  # type: ignore[method-assign]
        for step in range(1, int(DURATION_S / ASK_EVERY_S)):
            clock.call_at(step * ASK_EVERY_S, loop.fleet.warm_up)
    clock.run()
    return run


def ratios(without: Sequence[dict[str, float]], with_: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return, for each figure, the mean of with ÷ without over the seeds, and its spread."""
    return {
        name: {
            "mean": fmean(values := [b[name] / a[name] for a, b in zip(without, with_, strict=True)]),
            "sd": stdev(values) if len(values) > 1 else 0.0,
        }
        for name in ("mean_ttft_s", "p99_ttft_s", "mean_e2e_s", "computed_tokens")
    }


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Simulate, print and keep the result."""
    table = Table(title=f"With warm-ups ÷ without, simulated, {seeds} seeds (below 1: warm-ups pay)")
    for column in (
        "scenario",
        "workload",
        "policy",
        "mean TTFT",
        "p99 TTFT",
        "mean latency",
        "computed",
        "n",
    ):
        table.add_column(column)
    cases = []
    for scenario, (workload, rps), policy in product(("restarts", "calm"), LOADS, POLICIES):
        runs = {
            warm: [
                play(workload, rps, policy, seed, restarts=scenario == "restarts", warm=warm).figures()
                for seed in range(seeds)
            ]
            for warm in (False, True)
        }
        found = ratios(runs[False], runs[True])
        num = fmean(one["warm_ups"] for one in runs[True])
        case = {"scenario": scenario, "workload": workload, "rps": rps, "policy": policy}
        cases.append({**case, "ratios": found, "without": runs[False], "with": runs[True]})
        shown = [f"{value['mean']:.2f} ±{value['sd']:.2f}" for value in found.values()]
        table.add_row(scenario, f"{workload} {rps}/s", policy, *shown, f"{num:.0f}")
    Console(width=120).print(table)
    result = {
        "simulated": True,
        "profile": PROFILE,
        "workers": WORKERS,
        "seeds": seeds,
        "cases": cases,
        "command": f"python -m benchmarks.experiments.warming --seeds {seeds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    typer.run(main)
