"""Many points at once: each is simulated in a process of its own, and comes back with what it was."""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.errors import InputError
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import Setting, simulate
from preble_sgl.sim.report import Summary


@dataclass(frozen=True, slots=True)
class Point:
    """What was simulated, and what came of it."""

    setting: Setting
    load: Load
    summary: Summary

    def as_json(self) -> dict[str, Any]:
        """Return the point as plain values."""
        values = {name: _rounded(value) for name, value in asdict(self.summary).items()}
        return {
            "workload": self.load.workload,
            "policy": self.setting.policy,
            "profile": self.setting.profile.name,
            "gpus": self.setting.gpus,
            "rps": self.load.rps,
            "seed": self.setting.seed,
            **values,
        }


def run_points(todo: Sequence[tuple[Setting, Load]], *, jobs: int | None = None) -> list[Point]:
    """Simulate points side by side, with a progress bar on standard error; return them in order.

    `jobs`: processes, one per core by default. Raises what the first point that fails raises.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs={jobs}: at least 1 is needed")
    processes = min(jobs or os.cpu_count() or 1, len(todo))
    with _bar(len(todo)) as progress:
        if processes <= 1:
            return [_advance(progress, _run(*one)) for one in todo]
        return _side_by_side(todo, processes, progress)


def _side_by_side(todo: Sequence[tuple[Setting, Load]], processes: int, progress: Progress) -> list[Point]:
    """Begin with the points that have most to do, so that no process is left with a long one at the end."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        largest_first = sorted(range(len(todo)), key=lambda i: -todo[i][1].num_requests)
        futures = {pool.submit(_run, *todo[i]): i for i in largest_first}
        points: dict[int, Point] = {}
        try:
            for future in as_completed(futures):
                points[futures[future]] = _advance(progress, future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [points[i] for i in range(len(todo))]


def _run(setting: Setting, load: Load) -> Point:
    gc.set_threshold(*GC_THRESHOLDS)
    sessions, arrivals = load.play(setting.seed)
    return Point(setting, load, simulate(setting, sessions, arrivals, num_requests=load.num_requests))


@contextmanager
def _bar(num_points: int) -> Iterator[Progress]:
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("points"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        progress.add_task("points", total=num_points)
        yield progress


def _advance(progress: Progress, point: Point) -> Point:
    progress.advance(progress.task_ids[0])
    return point


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def by_seed(points: Iterable[Point]) -> dict[tuple[str, str, int, float | None], list[Point]]:
    """Group points that differ only in their seed, by workload, policy, GPUs and rate."""
    groups: dict[tuple[str, str, int, float | None], list[Point]] = {}
    for point in points:
        key = (point.load.workload, point.setting.policy, point.setting.gpus, point.load.rps)
        groups.setdefault(key, []).append(point)
    return groups
