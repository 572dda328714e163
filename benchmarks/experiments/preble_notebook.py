"""Preble's unpublished measurements, simulated: how far is the simulator from its authors' GPUs?

    python -m benchmarks.experiments.preble_notebook [--quick] [--seeds 3] [--jobs 2] [--out FILE]

A notebook in Preble's repository plots mean latencies of three systems on A6000, read off the plots here to
about 5 %. Each system runs as its authors ran it: Preble's published code with its local order and chunks of
1,024 tokens mixed with decodes, the others with longest prefix match and no mixing, and nothing held back for
any of them. `--quick`: one seed, a fifth of the time; it writes nothing unless --out says where.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from benchmarks.experiments.preble_figure3 import DURATION_S, HARDWARE
from benchmarks.rows import Row, Study, about, cells, conclude, mean
from preble_sgl.commands.sweep import Point, run_points
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import Setting

RESULT = Path("benchmarks/results/preble_notebook")
PROFILE = "a6000-mistral-7b"
CHUNK_TOKENS = 1024
VARIANT = "as its authors ran it"

PREBLE, HASHED, ROUND_ROBIN = "Preble", "consistent hashing", "SGLang, round robin"
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    PREBLE: {"policy": "preble_literal", "order": "preble_groups", "mixed_chunk": True},
    HASHED: {"policy": "consistent_hash"},
    ROUND_ROBIN: {"policy": "round_robin"},
}


class Curve(NamedTuple):
    """Measured mean latencies in seconds at some requests per second, of SYSTEMS in their order."""

    hardware: str
    workload: str
    rps: Sequence[float]
    mean_s: Sequence[Sequence[float]]


MEASURED = (
    Curve(
        "2xa6000",
        "videoqa",
        (1, 2, 3, 4, 5, 6, 7),
        ((1.5, 3, 4, 8.5, 12, 13, 16), (2, 14.5, 24, 31, 33, 36, 36.5), (2, 8.5, 34, 46, 50, 54.5, 57.5)),
    ),
    Curve(
        "2xa6000",
        "loogle",
        (0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0),
        (
            (7, 9, 14.5, 27, 35.5, 54.5, 63),
            (6, 9, 31, 42.5, 37, 54, 45),
            (7.5, 14, 46.5, 68, 67.5, 85.5, 83.5),
        ),
    ),
    Curve(
        "4xa6000",
        "loogle",
        (0.4, 0.6, 1.0, 1.4, 1.6, 1.8),
        ((7, 8.5, 15, 24.5, 28.5, 50.5), (5, 9, 17, 31, 32, 38), (6.5, 10, 50.5, 77, 88.5, 101.5)),
    ),
)


class Run(NamedTuple):
    """One point to simulate."""

    hardware: str
    system: str
    setting: Setting
    load: Load

    def row(self, point: Point) -> Row:
        """Return what came of it."""
        return Row.of(
            point.summary,
            hardware=self.hardware,
            workload=self.load.workload,
            variant=VARIANT,
            rps=self.load.rps or 0.0,
            policy=self.system,
            seed=self.setting.seed,
        )


def runs(seeds: int, share: float) -> Iterator[Run]:
    """Yield a run for each measured point and seed."""
    profile = load_profile(PROFILE)
    small = replace(profile, chunk_tokens=CHUNK_TOKENS)
    for curve in MEASURED:
        workers = HARDWARE[curve.hardware].workers
        for rps in curve.rps:
            duration_s = share * DURATION_S[curve.workload]
            load = Load(workload=curve.workload, rps=rps, duration_s=duration_s, scale_gpus=workers)
            for system, options in SYSTEMS.items():
                of_system = small if system == PREBLE else profile
                for seed in range(seeds):
                    setting = Setting(
                        gpus=workers, profile=of_system, seed=seed, prefix_first=False, **options
                    )
                    yield Run(curve.hardware, system, setting, load)


def measured() -> dict[tuple[str, str, float, str], float]:
    """Return the measured mean latency by hardware, workload, rate and system."""
    return {
        (curve.hardware, curve.workload, rps, system): value
        for curve in MEASURED
        for system, values in zip(SYSTEMS, curve.mean_s, strict=True)
        for rps, value in zip(curve.rps, values, strict=True)
    }


def table(study: Study) -> Table:
    """Return simulated beside measured mean latencies."""
    shown = Table(title="mean latency, s: simulated / measured by Preble's authors")
    for column in ("hardware", "workload", "req/s", *SYSTEMS):
        shown.add_column(column)
    truth = measured()
    for cell, systems in cells(study.rows).items():
        where = (cell.hardware, cell.workload, cell.rps)
        texts = [f"{mean(rows, 'mean_s'):.1f} / {truth[(*where, name)]:g}" for name, rows in systems.items()]
        shown.add_row(cell.hardware, cell.workload, f"{cell.rps:g}", *texts)
    return shown


def headline(study: Study) -> dict[str, dict[str, list[float]]]:
    """Return simulated over measured, by curve and system, in the order of the rates."""
    truth, ratios = measured(), dict[str, dict[str, list[float]]]()
    for cell, systems in cells(study.rows).items():
        of_curve = ratios.setdefault(f"{cell.hardware} {cell.workload}", {})
        for name, rows in systems.items():
            off = mean(rows, "mean_s") / truth[(cell.hardware, cell.workload, cell.rps, name)]
            of_curve.setdefault(name, []).append(round(off, 2))
    return ratios


def main(
    quick: Annotated[bool, typer.Option(help="One seed, a fifth of the time.")] = False,
    seeds: Annotated[int, typer.Option()] = 3,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where .json goes.")] = None,
) -> None:
    """Simulate, print and keep the result."""
    began_at = perf_counter()
    seeds, share = (1, 0.2) if quick else (seeds, 1.0)
    todo = list(runs(seeds, share))
    points = run_points([(run.setting, run.load) for run in todo], jobs=jobs)
    rows = [run.row(point) for run, point in zip(todo, points, strict=True)]
    durations = {name: share * DURATION_S[name] for name in ("videoqa", "loogle")}
    command = "preble_notebook" + " --quick" * quick
    facts = about(command, [load_profile(PROFILE)], quick=quick, seeds=seeds, durations_s=durations)
    study = Study(facts, rows)
    last_line = {"label": "simulated over measured", "headline": headline(study)}
    kept = out or (None if quick else RESULT)
    conclude(study, table(study), last_line, began_at=began_at, jobs=jobs, out=kept)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
