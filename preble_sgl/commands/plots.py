"""Plots of simulated points: latency over request rate, one line per policy."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from preble_sgl.commands.sweep import Point, by_seed
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = (("mean_e2e_s", "mean latency, s"), ("p99_e2e_s", "p99 latency, s"))


def plot_points(points: Sequence[Point], path: Path) -> None:
    """Draw mean and p99 latency over requests per second, a row per workload and number of GPUs.

    Lines are means over seeds, bands from the least to the greatest. Raises InputError without matplotlib.
    """
    panels = sorted({(point.load.workload, point.setting.gpus) for point in points})
    figure = new_figure(width=9, height=3.2 * len(panels))
    axes = figure.subplots(len(panels), len(METRICS), squeeze=False)
    for row, (workload, gpus) in zip(axes, panels, strict=True):
        of_panel = [p for p in points if p.load.workload == workload and p.setting.gpus == gpus]
        for axis, (metric, label) in zip(row, METRICS, strict=True):
            draw(axis, of_panel, metric)
            profile = of_panel[0].setting.profile.name
            axis.set(
                title=f"{Path(workload).name}, {gpus} × {profile}", xlabel="requests per second", ylabel=label
            )
    axes[0][0].legend(fontsize="small")
    figure.text(0.01, 0.002, "simulated", fontsize="small", color="gray")
    figure.savefig(path)


def draw(axis: "Axes", points: Sequence[Point], metric: str) -> None:
    """Draw one metric, on a logarithmic scale, a line per policy in the order in which they come."""
    for policy in dict.fromkeys(point.setting.policy for point in points):
        groups = by_seed(point for point in points if point.setting.policy == policy)
        values = {key[3] or 0.0: [getattr(p.summary, metric) for p in group] for key, group in groups.items()}
        rates = sorted(values)
        axis.plot(rates, [fmean(values[rate]) for rate in rates], marker="o", markersize=3, label=policy)
        low, high = [min(values[r]) for r in rates], [max(values[r]) for r in rates]
        axis.fill_between(rates, low, high, alpha=0.15)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")


def new_figure(*, width: float, height: float) -> Any:
    """Return an empty figure; its size is in inches. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib: pip install matplotlib, or leave out --plot") from error
    return Figure(figsize=(width, height), layout="constrained")
