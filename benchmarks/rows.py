"""Rows of simulated results: kept in a JSON file, one row a line, and compared over seeds.

Rows of one *cell* differ only in policy and seed. Their ratios compare means over seeds. One policy *beats*
another in a cell if it is better in every seed, and by more than MARGIN in the mean: equal seeds are equal
loads, so the comparison is paired.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import orjson
from rich.console import Console
from rich.table import Table

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.errors import InputError
from preble_sgl.profiles import Profile
from preble_sgl.sim.report import Summary

BASE = "round_robin"
SIMPLE = ("cache_aware", "sticky", "consistent_hash", "lmetric")
OURS = ("preble_e2", "preble_plan")
POLICIES = (BASE, "preble_literal", *OURS, *SIMPLE)
"""Preble's own baseline, its code, its paper, what this project adds, and what every gateway can do."""

METRICS = ("mean_s", "p99_s")
MARGIN = 0.02
DIGITS = 4

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One simulated run. Latencies are end to end unless they say otherwise.

    `variant`: the local scheduler, and what else may differ.
    """

    hardware: str
    workload: str
    variant: str
    rps: float
    policy: str
    seed: int
    mean_s: float
    p99_s: float
    ttft_s: float
    tpot_s: float
    hit_rate: float
    imbalance: float
    failed: int

    @classmethod
    def of(
        cls,
        summary: Summary,
        *,
        hardware: str,
        workload: str,
        variant: str,
        rps: float,
        policy: str,
        seed: int,
    ) -> "Row":
        """Return the row of a run, rounded to DIGITS significant digits."""
        return cls(
            hardware=hardware,
            workload=workload,
            variant=variant,
            rps=_rounded(rps),
            policy=policy,
            seed=seed,
            mean_s=_rounded(summary.mean_e2e_s),
            p99_s=_rounded(summary.p99_e2e_s),
            ttft_s=_rounded(summary.mean_ttft_s),
            tpot_s=_rounded(summary.mean_tpot_s),
            hit_rate=_rounded(summary.hit_rate),
            imbalance=_rounded(summary.imbalance),
            failed=summary.failed,
        )


class Cell(NamedTuple):
    """Where policies are compared with each other."""

    hardware: str
    workload: str
    variant: str
    rps: float


Cells = Mapping[Cell, Mapping[str, Sequence[Row]]]
"""The rows of each policy in each cell, by seed."""


def cells(rows: Iterable[Row]) -> Cells:
    """Group rows by cell and policy, both in the order in which they first come."""
    groups: dict[Cell, dict[str, list[Row]]] = {}
    for row in rows:
        cell = groups.setdefault(Cell(row.hardware, row.workload, row.variant, row.rps), {})
        cell.setdefault(row.policy, []).append(row)
    return groups


# On disk


@dataclass(frozen=True, slots=True)
class Study:
    """What a result file holds: how it was made, and the rows."""

    about: Mapping[str, Any]
    rows: Sequence[Row]

    def write(self, path: Path) -> None:
        """Write the file, a row a line."""
        write_rows(path, self.about, Row, map(astuple, self.rows))

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read the file. Raises InputError if there is none or its rows have other columns."""
        return cls(*read_rows(path, Row))


def write_rows(path: Path, about: Mapping[str, Any], kind: type, rows: Iterable[Sequence[Any]]) -> None:
    """Write how a result was made and the values of its rows, of the dataclass `kind`, a row a line."""
    head = orjson.dumps(dict(about), option=orjson.OPT_INDENT_2).decode().removesuffix("\n}")
    columns = orjson.dumps([field.name for field in fields(kind)]).decode()
    lines = ",\n".join(orjson.dumps(row).decode() for row in rows)
    path.write_text(f'{head},\n  "columns": {columns},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read_rows(path: Path, kind: type[T]) -> tuple[dict[str, Any], list[T]]:
    """Read what `write_rows` wrote. Raises InputError if there is no file or its rows have other columns."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run python -m benchmarks.experiments.{path.stem}")
    about = orjson.loads(path.read_bytes())
    columns, rows = about.pop("columns"), about.pop("rows")
    if columns != [field.name for field in fields(kind)]:  # type: ignore[arg-type]
        raise InputError(f"{path} has other columns than this code: make it again")
    return about, [kind(**dict(zip(columns, row, strict=True))) for row in rows]


def conclude(
    study: Study, shown: Table, last_line: Mapping[str, Any], *, began_at: float, jobs: int, out: Path | None
) -> None:
    """Print a study's table, how long it took since `began_at`, and JSON; keep it if `out` says where."""
    console = Console(width=140)
    console.print(shown)
    console.print(f"{len(study.rows)} points in {perf_counter() - began_at:.0f} s with {jobs} processes")
    if out is not None:
        study.write(out.with_suffix(".json"))
    print(orjson.dumps(last_line).decode())


def about(command: str, profiles: Iterable[Profile], **more: object) -> dict[str, Any]:
    """Return what a reader must know of a simulated result."""
    return {
        "label": "simulated, not measured",
        "command": f"python -m benchmarks.experiments.{command}",
        "profiles": {
            profile.name: f"{profile.kind}. {' '.join(profile.error.split())}" for profile in profiles
        },
        **more,
    }


# Comparisons


def mean(rows: Sequence[Row], metric: str) -> float:
    """Return the mean over seeds."""
    return fmean([float(getattr(row, metric)) for row in rows])


def spread(rows: Sequence[Row], metric: str) -> float:
    """Return half the range over seeds."""
    values = [float(getattr(row, metric)) for row in rows]
    return (max(values) - min(values)) / 2


def ratio(of: Sequence[Row], to: Sequence[Row], metric: str) -> float:
    """Return the mean of one policy over the mean of another; infinite if the latter is 0."""
    below = mean(to, metric)
    return mean(of, metric) / below if below else float("inf")


class Compared(NamedTuple):
    """What a ratio of latencies is about."""

    hardware: str
    workload: str
    metric: str
    policy: str


def ranges(grouped: Cells) -> dict[Compared, tuple[float, float]]:
    """Return the least and greatest ratio BASE/policy over the rates."""
    ratios: dict[Compared, list[float]] = {}
    for cell, rows in grouped.items():
        for metric in METRICS:
            for policy in rows.keys() - {BASE}:
                compared = Compared(cell.hardware, cell.workload, metric, policy)
                ratios.setdefault(compared, []).append(ratio(rows[BASE], rows[policy], metric))
    return {compared: (min(values), max(values)) for compared, values in sorted(ratios.items())}


class Win(NamedTuple):
    """A simple baseline beats one of ours. `factor`: ours over the baseline."""

    cell: Cell
    metric: str
    ours: str
    simple: str
    factor: float


def simple_wins(grouped: Cells) -> Iterator[Win]:
    """Yield where a simple baseline beats one of ours."""
    for cell, rows in grouped.items():
        for metric in METRICS:
            for ours in OURS:
                for simple in SIMPLE:
                    if beats(rows[simple], rows[ours], metric):
                        yield Win(cell, metric, ours, simple, ratio(rows[ours], rows[simple], metric))


def beats(rows: Sequence[Row], others: Sequence[Row], metric: str) -> bool:
    """Say whether `rows` are better in every seed, and by more than MARGIN in the mean."""
    theirs = {row.seed: getattr(row, metric) for row in others}
    in_every_seed = all(getattr(row, metric) < theirs[row.seed] for row in rows)
    return in_every_seed and ratio(others, rows, metric) > 1 + MARGIN


# Running


def side_by_side(run: Callable[[T], R], todo: Sequence[T], jobs: int) -> list[R]:
    """Run a function of the module that asks, in processes of their own; return the results in order."""
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=gc.set_threshold, initargs=GC_THRESHOLDS
    ) as pool:
        return list(pool.map(run, todo))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
