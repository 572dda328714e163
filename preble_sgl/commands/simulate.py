"""`preble-sgl simulate`: policies against each other, in virtual time, on workers that nobody has to own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import orjson
from rich.console import Console
from rich.table import Table

from preble_sgl.commands.plots import plot_points
from preble_sgl.commands.sweep import Point, by_seed, run_points
from preble_sgl.errors import InputError
from preble_sgl.global_sched.make import check_name
from preble_sgl.profiles import Profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import Setting

COLUMNS = (
    ("mean_e2e_s", "latency, s", ".2f"),
    ("p99_e2e_s", "p99, s", ".2f"),
    ("mean_ttft_s", "TTFT, s", ".3f"),
    ("mean_program_s", "program, s", ".2f"),
    ("hit_rate", "hit rate", ".1%"),
    ("imbalance", "imbalance", ".2f"),
)
MAX_GPUS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds that a latency has to keep, in seconds, and what they bound: a field of `Summary`."""

    bounds: tuple[tuple[str, float], ...]

    def met(self, points: Sequence[Point]) -> bool:
        """Say whether the mean over seeds keeps every bound, and no request failed."""
        return all(
            fmean(getattr(point.summary, metric) for point in points) <= bound_s
            for metric, bound_s in self.bounds
        ) and not any(point.summary.failed for point in points)

    def __str__(self) -> str:
        return ", ".join(f"{metric} <= {bound_s:g}" for metric, bound_s in self.bounds)


def simulate_points(
    settings: Sequence[Setting], loads: Sequence[Load], *, jobs: int | None, plot: Path | None
) -> None:
    """Simulate every setting under every load; print a table, draw a plot, and print JSON last."""
    console = wide_console()
    points = run_points([(setting, load) for load in loads for setting in settings], jobs=jobs)
    console.print(table(points))
    console.print(origin(settings[0].profile), highlight=False)
    if plot is not None and find_spec("matplotlib") is None:
        console.print("no plot: pip install matplotlib", highlight=False)
    elif plot is not None:
        plot_points(points, plot)
        console.print(f"plot: {plot}", highlight=False)
    print(orjson.dumps({"points": [point.as_json() for point in points]}).decode())


def how_many_gpus(settings: Sequence[Setting], load: Load, slo: Slo, *, jobs: int | None) -> None:
    """Find for each policy the fewest workers that keep the SLO; print a table, and JSON as the last line.

    Doubles until it is kept, then bisects: more workers are taken to be no worse.
    """
    console = wide_console()
    answers = {}
    shown = Table(title=f"fewest workers for {slo} at {load.rps or 'recorded'} requests/s, simulated")
    for column in ("policy", "workers", *(name for _, name, _ in COLUMNS)):
        shown.add_column(column, justify="left" if column == "policy" else "right")
    for policy in dict.fromkeys(setting.policy for setting in settings):
        found = _fewest([s for s in settings if s.policy == policy], load, slo, jobs)
        answers[policy] = found[0].setting.gpus if found else None
        shown.add_row(policy, *(_cells(found) if found else [f"more than {MAX_GPUS}"]))
    console.print(shown)
    console.print(origin(settings[0].profile), highlight=False)
    print(orjson.dumps({"slo": dict(slo.bounds), "rps": load.rps, "gpus": answers}).decode())


def _fewest(seeds: Sequence[Setting], load: Load, slo: Slo, jobs: int | None) -> list[Point] | None:
    """Return the points, one per seed, with the fewest workers that keep the SLO."""
    tried: dict[int, list[Point]] = {}

    def keeps(gpus: int) -> bool:
        todo = [(setting.on(gpus), load) for setting in seeds]
        tried[gpus] = run_points(todo, jobs=jobs)
        return slo.met(tried[gpus])

    most = 1
    while not keeps(most):
        most *= 2
        if most > MAX_GPUS:
            return None
    least = most // 2 + 1
    while least < most:
        middle = (least + most) // 2
        if keeps(middle):
            most = middle
        else:
            least = middle + 1
    return tried[most]


def wide_console() -> Console:
    """Return a console that does not fold tables when the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def table(points: Sequence[Point]) -> Table:
    """Return the points, seeds averaged, with the range of the mean latency over the seeds."""
    shown = Table(title="simulated")
    for column in ("workload", "policy", "req/s", "workers", *(name for _, name, _ in COLUMNS), "failed"):
        shown.add_column(column, justify="left" if column in ("workload", "policy") else "right")
    for (workload, policy, _, rps), group in by_seed(points).items():
        rate = "recorded" if rps is None else f"{rps:g}"
        failed = sum(point.summary.failed for point in group)
        shown.add_row(Path(workload).name, policy, rate, *_cells(group), f"{failed}")
    return shown


def _cells(group: Sequence[Point]) -> list[str]:
    cells = [f"{group[0].setting.gpus}"]
    for metric, _, form in COLUMNS:
        values = [getattr(point.summary, metric) for point in group]
        cells.append(format(fmean(values), form))
        if metric == "mean_e2e_s" and len(values) > 1:
            cells[-1] += f" ({min(values):{form}}–{max(values):{form}})"
    return cells


def origin(profile: Profile) -> str:
    """Say where the timing comes from, for below every table."""
    error = " ".join(profile.error.split())
    return f"simulated, not measured; {profile.name}: {profile.kind}. {error}"


def parse_rates(text: str) -> list[float]:
    """Return the rates of `10`, `1,2,4` or `5:30:5` (first, last, step). Raises InputError."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
        if step <= 0 or last < first:
            raise ValueError
        return [first + i * step for i in range(int((last - first) / step + 1e-9) + 1)]
    except (ValueError, OverflowError):
        raise InputError(f"--rps {text}: give a rate, several as 1,2,4, or first:last:step") from None


def parse_names(text: str) -> list[str]:
    """Return the policies of a list with commas. Raises InputError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_name(name)
    if not names:
        raise InputError("--policy: give at least one policy")
    return names
