"""How long the simulator takes for a study's worth of requests, on one core, and where the time goes.

    python -m benchmarks.experiments.simulator_speed [--requests 100000] [--rounds 3] [--out FILE]

ToolBench-shaped requests arrive at 40 per second at 8 simulated runtimes of an A6000. Wall time covers all of
it: drawing the workload, the global scheduler, the engine models, the summary. The policies take turns, in an
order that rotates from round to round. The shares come from one more run, of `preble_plan` under cProfile,
which makes calls look dearer than they are: what a built-in function or the standard library takes is counted
where it was called from. The garbage collector is set as `preble-sgl` sets it.
"""

import cProfile
import gc
import platform
import pstats
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

import preble_sgl
from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.profiles import load_profile
from preble_sgl.sim.arrivals import poisson
from preble_sgl.sim.points import Setting, simulate
from preble_sgl.sim.report import Summary
from preble_sgl.sim.workloads import toolbench

RESULT = Path("benchmarks/results/simulator_speed")
POLICIES = ("round_robin", "preble_e2", "preble_plan")
PROFILED = "preble_plan"
PROFILE = load_profile("a6000-mistral-7b")
RUNTIMES = 8
RATE = 40.0
GOAL_S = 60.0

PACKAGE = Path(preble_sgl.__file__).parent
WORKLOAD_FILES = ("arrivals", "distributions", "popularity", "workloads")
DRIVER_FILES = ("points", "report", "simulator", "virtual_time")
OTHER = "other"

Function = tuple[str, int, str]
"""What cProfile knows a function by: file, line, name."""


def run(policy: str, num_requests: int) -> Summary:
    """Simulate it once."""
    setting = Setting(policy=policy, gpus=RUNTIMES, profile=PROFILE)
    workload = toolbench()
    return simulate(
        setting,
        workload.sessions(random.Random(0)),
        poisson(workload.session_rate(RATE), random.Random(1)),
        num_requests=num_requests,
    )


def timed(policy: str, num_requests: int) -> tuple[float, Summary]:
    """Return the seconds that a run takes, and what came of it."""
    gc.collect()
    started_at = perf_counter()
    summary = run(policy, num_requests)
    return perf_counter() - started_at, summary


def measure(num_requests: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row per policy."""
    runs: dict[str, list[tuple[float, Summary]]] = {policy: [] for policy in POLICIES}
    for number in range(rounds):
        turn = number % len(POLICIES)
        for policy in POLICIES[turn:] + POLICIES[:turn]:
            runs[policy].append(timed(policy, num_requests))
    return [
        _row(policy, [wall_s for wall_s, _ in runs[policy]], runs[policy][0][1], num_requests)
        for policy in POLICIES
    ]


def _row(policy: str, walls: list[float], summary: Summary, num_requests: int) -> dict[str, Any]:
    assert (summary.finished, summary.failed) == (num_requests, 0), summary
    wall_s = median(walls)
    return {
        "policy": policy,
        "wall_s": round(wall_s, 2),
        "wall_min_s": round(min(walls), 2),
        "wall_max_s": round(max(walls), 2),
        "requests_per_s": round(num_requests / wall_s),
        "simulated_s": round(summary.makespan_s),
        "simulated_s_per_s": round(summary.makespan_s / wall_s, 1),
        "mean_latency_s": round(summary.mean_e2e_s, 4),
        "hit_rate": round(summary.hit_rate, 4),
        "under_a_minute": wall_s < GOAL_S,
    }


# Where the time goes


def shares(num_requests: int) -> dict[str, float]:
    """Return the share of each part of the program in a profiled run."""
    profiler = cProfile.Profile()
    profiler.runcall(run, PROFILED, num_requests)
    stats: Mapping[Function, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    seconds: dict[str, float] = defaultdict(float)
    for function, (_, _, own_s, _, callers) in stats.items():
        for part, share in _charged(function, callers, own_s):
            seconds[part] += share
    total_s = sum(seconds.values())
    ordered = sorted(seconds, key=lambda part: -seconds[part])
    return {part: round(seconds[part] / total_s, 3) for part in ordered}


def _charged(
    function: Function, callers: Mapping[Function, Any], own_s: float
) -> Iterator[tuple[str, float]]:
    """Yield who is charged for a function's own time: its part, or those of its callers."""
    part = part_of(function[0])
    if part is not None or not callers:
        yield part or OTHER, own_s
        return
    for caller, (_, _, from_there_s, _) in callers.items():
        yield part_of(caller[0]) or OTHER, from_there_s


def part_of(file: str) -> str | None:
    """Return the part of the program that a file belongs to, None for what is not ours."""
    if file == random.__file__:
        return "workload generation"
    path = Path(file)
    if not path.is_relative_to(PACKAGE):
        return None
    if "global_sched" in path.parts:
        return "scheduler"
    if path.parent.name != "sim":
        return "core"
    if path.stem in WORKLOAD_FILES:
        return "workload generation"
    return "driver" if path.stem in DRIVER_FILES else "engine"


# Showing it


def table(rows: list[dict[str, Any]], num_requests: int) -> Table:
    """Return the rows as a table."""
    shown = Table(title=f"{num_requests:,} requests on {RUNTIMES} simulated runtimes, one core")
    for column in ("policy", "wall s (median, range)", "requests/s", "simulated s per s"):
        shown.add_column(column)
    for row in rows:
        wall = f"{row['wall_s']} ({row['wall_min_s']}–{row['wall_max_s']})"
        shown.add_row(row["policy"], wall, f"{row['requests_per_s']:,}", f"{row['simulated_s_per_s']:,}")
    return shown


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 100_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    gc.set_threshold(*GC_THRESHOLDS)
    rows = measure(requests, rounds)
    profiled = shares(requests)
    console = Console()
    console.print(table(rows, requests))
    console.print(f"{PROFILED}: " + ", ".join(f"{part} {share:.0%}" for part, share in profiled.items()))
    result = {
        "rows": rows,
        "profiled": {"policy": PROFILED, "shares": profiled},
        "requests": requests,
        "rounds": rounds,
        "rate": RATE,
        "runtimes": RUNTIMES,
        "profile": PROFILE.name,
        "machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
        "command": "python -m benchmarks.experiments.simulator_speed"
        f" --requests {requests} --rounds {rounds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    typer.run(main)
