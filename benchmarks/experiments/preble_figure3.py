"""Preble's figure 3, simulated: five workloads on three kinds of hardware, over the paper's request rates.

    python -m benchmarks.experiments.preble_figure3 [--quick] [--seeds 3] [--jobs 2] [--out FILE]

Every policy gets the same sessions, arrivals and local scheduler (SGLang's: longest prefix match). Workloads,
rates and durations are those of the paper's experiments; the cost profiles were fitted to its authors'
profiling. One more pass, at the middle rate on four A6000, changes the local scheduler for all alike, and
leaves out what this project's scheduler does under any policy: holding requests for a prefix in the making.
`--quick`: one seed, three rates, a fifth of the time; it writes nothing unless --out says where.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from matplotlib import rc_context
from rich.console import Console
from rich.table import Table

from benchmarks.rows import POLICIES, Cells, Compared, Row, Study, about, cells, ranges, simple_wins
from preble_sgl.commands.plots import METRICS, draw, new_figure
from preble_sgl.commands.sweep import Point, run_points
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import Setting

RESULT = Path("benchmarks/results/preble_figure3")
DURATION_S = {"toolbench": 300, "alfworld": 300, "apps": 625, "videoqa": 300, "loogle": 561}
"""Requests over rate in the code of the paper's experiments."""

PAPER = {"mean_s": (1.5, 14.5), "p99_s": (2.0, 10.0)}
"""Round robin over Preble, over all of figure 3 (its section 4.3)."""

LPM = "lpm"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    LPM: {},
    "lpm, mixed chunks": {"mixed_chunk": True},
    "preble_groups": {"order": "preble_groups"},
    "fcfs": {"order": "fcfs"},
    "lpm, nothing held": {"prefix_first": False},
}
"""Local schedulers, and no request held for a prefix that another computes, which no router does.

Preble's authors ran mixed chunks and groups for Preble only, and neither for SGLang.
"""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the paper ran on. A worker is one A6000, or four H100 in tensor parallel.

    `rps`: the ends of figure 3's axes. The number of prefixes grows with the number of workers.
    """

    profile: str
    workers: int
    rps: Mapping[str, tuple[float, float]]

    def rates(self, workload: str, num: int) -> list[float]:
        """Return `num` rates, evenly over the workload's range."""
        low, high = self.rps[workload]
        return [low + i * (high - low) / (num - 1) for i in range(num)]


TWO = {"toolbench": (5, 15), "alfworld": (5, 15), "apps": (1, 4), "videoqa": (2, 6), "loogle": (0.25, 1)}
FOUR = {"toolbench": (10, 30), "alfworld": (10, 30), "apps": (2, 8), "videoqa": (2.5, 10), "loogle": (0.5, 2)}
H100 = {"toolbench": (5, 15), "alfworld": (10, 15), "apps": (3, 5), "videoqa": (2, 6), "loogle": (0.4, 0.8)}
HARDWARE = {
    "2xa6000": Hardware("a6000-mistral-7b", 2, TWO),
    "4xa6000": Hardware("a6000-mistral-7b", 4, FOUR),
    "8xh100": Hardware("h100x4-llama3-70b", 2, H100),
}
VARIANTS_ON = "4xa6000"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is simulated. `share`: of the experiments' durations."""

    seeds: int
    num_rates: int = 5
    share: float = 1.0

    @property
    def durations_s(self) -> dict[str, float]:
        """For how long requests arrive, by workload."""
        return {workload: self.share * duration_s for workload, duration_s in DURATION_S.items()}


QUICK = Extent(seeds=1, num_rates=3, share=0.2)


@dataclass(frozen=True, slots=True)
class Run:
    """One point to simulate, and where it belongs."""

    hardware: str
    variant: str
    setting: Setting
    load: Load

    def row(self, point: Point) -> Row:
        """Return what came of it."""
        return Row.of(
            point.summary,
            hardware=self.hardware,
            workload=self.load.workload,
            variant=self.variant,
            rps=self.load.rps or 0.0,
            policy=self.setting.policy,
            seed=self.setting.seed,
        )


def main_runs(extent: Extent) -> Iterator[Run]:
    """Yield the points of figure 3."""
    for hardware, spec in HARDWARE.items():
        for workload in DURATION_S:
            for rps in spec.rates(workload, extent.num_rates):
                yield from cell_runs(extent, hardware, workload, rps, LPM)


def variant_runs(extent: Extent) -> Iterator[Run]:
    """Yield the points with one thing changed."""
    for workload in DURATION_S:
        middle = HARDWARE[VARIANTS_ON].rates(workload, 3)[1]
        for variant in list(VARIANTS)[1:]:
            yield from cell_runs(extent, VARIANTS_ON, workload, middle, variant)


def cell_runs(extent: Extent, hardware: str, workload: str, rps: float, variant: str) -> Iterator[Run]:
    """Yield a point for each policy and seed."""
    spec = HARDWARE[hardware]
    profile = load_profile(spec.profile)
    duration_s = extent.durations_s[workload]
    load = Load(workload=workload, rps=rps, duration_s=duration_s, scale_gpus=spec.workers)
    for policy in POLICIES:
        for seed in range(extent.seeds):
            setting = Setting(policy=policy, gpus=spec.workers, profile=profile, seed=seed)
            yield Run(hardware, variant, replace(setting, **VARIANTS[variant]), load)


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw mean and p99 latency over the rate, a row per workload; bands are over seeds."""
    figure = new_figure(width=9, height=2.6 * len(DURATION_S))
    axes = figure.subplots(len(DURATION_S), len(METRICS))
    for row, workload in zip(axes, DURATION_S, strict=True):
        of_workload = [point for point in points if point.load.workload == workload]
        for axis, (metric, label) in zip(row, METRICS, strict=True):
            draw(axis, of_workload, metric)
            axis.set(title=workload, xlabel="requests per second", ylabel=label)
    axes[0][0].legend(fontsize="x-small", ncols=2)
    figure.suptitle(f"{title}: simulated")
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def table(grouped: Cells) -> Table:
    """Return the least and greatest ratio of round robin to each policy."""
    spans = ranges(grouped)
    shown = Table(title="simulated: latency of round robin over that of ..., over the rates")
    for column in ("hardware", "workload", "latency", *POLICIES[1:]):
        shown.add_column(column)
    for where in dict.fromkeys(compared[:3] for compared in spans):
        texts = [f"{low:.2f}–{high:.2f}" for low, high in (spans[Compared(*where, p)] for p in POLICIES[1:])]
        shown.add_row(*where, *texts)
    return shown


def last_line(grouped: Cells) -> dict[str, Any]:
    """Return the ratios beside the paper's, and where simple baselines win."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for (hardware, workload, metric, policy), span in ranges(grouped).items():
        of_policies = ratios.setdefault(f"{hardware} {workload} {metric}", {})
        of_policies[policy] = [round(value, 2) for value in span]
    return {"label": "simulated", "paper": PAPER, "ratios": ratios, "simple_wins": wins(grouped)}


def wins(grouped: Cells) -> dict[str, str]:
    """Return in how many cells and metrics each simple baseline beats each of ours, and by how much."""
    factors: dict[str, list[float]] = {}
    for win in simple_wins(grouped):
        factors.setdefault(f"{win.simple} beats {win.ours}", []).append(win.factor)
    num = len(grouped) * len(METRICS)
    return {what: f"{len(found)} of {num}, up to {max(found):.2f}x" for what, found in factors.items()}


def main(
    quick: Annotated[bool, typer.Option(help="One seed, three rates, a fifth of the time.")] = False,
    seeds: Annotated[int, typer.Option()] = 3,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where .json and .svg go.")] = None,
) -> None:
    """Simulate, print and keep the result."""
    extent = QUICK if quick else Extent(seeds)
    began_at = perf_counter()
    runs = [*main_runs(extent), *variant_runs(extent)]
    points = run_points([(run.setting, run.load) for run in runs], jobs=jobs)
    done = list(zip(runs, points, strict=True))
    study = Study(facts(extent, quick=quick), [run.row(point) for run, point in done])
    grouped = cells(row for row in study.rows if row.variant == LPM)
    console = Console(width=180)
    console.print(table(grouped))
    console.print(f"{len(done)} points in {perf_counter() - began_at:.0f} s with {jobs} processes")
    if out is not None or not quick:
        study.write((out or RESULT).with_suffix(".json"))
        plot_all(done, out or RESULT)
    print(orjson.dumps({"headline": last_line(grouped)}).decode())


def facts(extent: Extent, *, quick: bool) -> dict[str, Any]:
    """Return how the result was made."""
    profiles = [load_profile(name) for name in dict.fromkeys(spec.profile for spec in HARDWARE.values())]
    command = "preble_figure3" + " --quick" * quick
    return about(command, profiles, quick=quick, seeds=extent.seeds, durations_s=extent.durations_s)


def plot_all(done: Sequence[tuple[Run, Point]], out: Path) -> None:
    """Draw a plot for each hardware."""
    for hardware, spec in HARDWARE.items():
        drawn = [point for run, point in done if run.hardware == hardware and run.variant == LPM]
        plot(drawn, f"{spec.workers} × {spec.profile}", out.with_name(f"{out.name}_{hardware}.svg"))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
