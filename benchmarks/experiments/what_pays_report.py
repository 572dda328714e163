"""Tables and the plot of `what_pays`: ratios of baselines to preble_plan, and ablations. All simulated."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.rows import read_rows, write_rows

Kind = Literal["plain", "ours", "limited", "router", "ablation"]

GPUS = 4
OURS = "preble_plan"
PLAIN = ("round_robin", "cache_aware", "sticky", "preble_e2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run. Means are over programs; `mean_request_s` and its three parts are over requests.

    `unsent_s`: waiting in the global queue, or held for a prefix. `prefill_s`: from then to the first token.
    `bound_s`: the least makespan. `tenant_s`: mean program latency of each tenant.
    """

    regime: str
    profile: str
    seed: int
    label: str
    kind: Kind
    bound_s: float
    num_programs: int
    num_calls: int
    mean_program_s: float
    p99_program_s: float
    makespan_s: float
    mean_request_s: float
    hit_rate: float
    imbalance: float
    busy_share: float
    computed_tokens: int
    unsent_s: float
    prefill_s: float
    decode_s: float
    tenant_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A baseline over preble_plan, mean program latency and makespan; above 1, preble_plan is better.

    `low`, `high`: the range of the first over the seeds.
    """

    label: str
    mean: float
    low: float
    high: float
    makespan: float

    def __str__(self) -> str:
        spread = f" [{self.low:.2f}–{self.high:.2f}]" if self.low != self.high else ""
        return f"{self.mean:.2f}{spread}"


def ratio(rows: Iterable[Row], label: str) -> Ratio:
    """Compare a baseline with preble_plan, seed by seed; `rows` are of one regime and profile."""
    by_label = {(row.label, row.seed): row for row in rows}
    seeds = sorted({seed for found, seed in by_label if found == OURS})
    pairs = [(by_label[label, seed], by_label[OURS, seed]) for seed in seeds]
    each = [theirs.mean_program_s / ours.mean_program_s for theirs, ours in pairs]
    makespan = fmean(theirs.makespan_s / ours.makespan_s for theirs, ours in pairs)
    return Ratio(label, fmean(each), min(each), max(each), makespan)


def best(rows: Sequence[Row], *kinds: Kind) -> Ratio | None:
    """Return the baseline of these kinds that is best in hindsight, by mean program latency."""
    labels = dict.fromkeys(row.label for row in rows if row.kind in kinds)
    return min((ratio(rows, label) for label in labels), key=lambda found: found.mean, default=None)


def write(path: Path, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write a result, a row a line."""
    write_rows(path, about, Row, ([_rounded(value) for value in astuple(row)] for row in rows))


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read a result. Raises InputError if there is none or its rows have other columns."""
    return read_rows(path, Row)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each profile and regime."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.profile, row.regime), []).append(row)
    return found


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the figures of the ratio tables as plain values."""
    found = []
    for (profile, regime), own in groups(rows).items():
        values: dict[str, Any] = {f"vs_{label}": round(ratio(own, label).mean, 3) for label in PLAIN}
        for name, kinds in BEST.items():
            if (winner := best(own, *kinds)) is not None:
                values |= {f"vs_{name}": round(winner.mean, 3), f"{name}_makespan": round(winner.makespan, 3)}
                values[name] = winner.label
        found.append({"profile": profile, "regime": regime} | values | _over_bound(own))
    return found


BEST: dict[str, tuple[Kind, ...]] = {
    "best_plain": ("plain",),
    "best_limited": ("plain", "limited"),
    "best_router": ("router",),
}
SHOWN = {
    "best_plain": "best plain",
    "best_limited": "best @K in hindsight",
    "best_router": "best as routers do",
}
"""Comparisons with the best of some kinds, and their names in tables and plots."""


def ratio_table(rows: Sequence[Row], profile: str) -> Table:
    """Return baseline over preble_plan for each regime; above 1, preble_plan is better."""
    shown = Table(title=f"simulated, {profile}: mean program latency, baseline ÷ preble_plan (makespan)")
    for column in ("regime", *PLAIN, *SHOWN.values(), "latency"):
        shown.add_column(column)
    shown.add_column("makespan ÷ bound: ours, best plain")
    for (of, regime), own in groups(rows).items():
        if of == profile:
            cells = [str(ratio(own, label)) for label in PLAIN]
            cells += [_named(best(own, *kinds)) for kinds in BEST.values()]
            over = _over_bound(own)
            bound = f"{over['over_bound']:.2f}, {over['best_plain_over_bound']:.2f}"
            shown.add_row(regime, *cells, _named(ratio(own, "preble_plan, latency"), name=False), bound)
    return shown


def ablation_table(rows: Sequence[Row], profile: str) -> Table:
    """Return mean program latency and makespan of preble_e2, preble_plan and what lies between."""
    by_regime = {regime: own for (of, regime), own in groups(rows).items() if of == profile}
    ablated = {regime: own for regime, own in by_regime.items() if any(row.kind == "ablation" for row in own)}
    shown = Table(title=f"simulated, {profile}: mean program latency / makespan, s")
    for column in ("variant", *ablated):
        shown.add_column(column)
    kept = [row for row in rows if row.kind == "ablation" or row.label in ("preble_e2", OURS)]
    for label in dict.fromkeys(row.label for row in kept):
        shown.add_row(label, *(_seconds(own, label) for own in ablated.values()))
    return shown


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio to the best plain policy and to the best @K per regime, a panel per profile."""
    profiles = list(dict.fromkeys(row.profile for row in rows))
    figure = Figure(figsize=(5.5 * len(profiles), 5), layout="constrained")
    axes = figure.subplots(1, len(profiles), squeeze=False, sharey=True)[0]
    for axis, profile in zip(axes, profiles, strict=True):
        of_profile = {regime: own for (of, regime), own in groups(rows).items() if of == profile}
        _bars(axis, of_profile)
        axis.set_title(f"simulated, {GPUS} × {profile}", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    figure.supxlabel("ratio of mean program latencies (above 1: preble_plan is better)", fontsize=10)
    figure.savefig(path)


def _bars(axis: Any, by_regime: dict[str, list[Row]]) -> None:
    names = list(by_regime)[::-1]
    series = {name: [best(by_regime[regime], *kinds) for regime in names] for name, kinds in BEST.items()}
    for number, (name, values) in enumerate(series.items()):
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        axis.barh(
            [i + 0.27 * (1 - number) for i, _ in known],
            [value.mean for _, value in known],
            xerr=[[v.mean - v.low for _, v in known], [v.high - v.mean for _, v in known]],
            height=0.25,
            label=f"{SHOWN[name]} ÷ preble_plan",
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.spines[["top", "right"]].set_visible(False)


def _over_bound(rows: Sequence[Row]) -> dict[str, float]:
    """Return makespan over its bound, of preble_plan and of the plain policy with the least."""
    plain = [_over(rows, label) for label in PLAIN]
    return {"over_bound": round(_over(rows, OURS), 3), "best_plain_over_bound": round(min(plain), 3)}


def _over(rows: Sequence[Row], label: str) -> float:
    return fmean(row.makespan_s / row.bound_s for row in rows if row.label == label)


def _named(found: Ratio | None, *, name: bool = True) -> str:
    if found is None:
        return "–"
    return f"{found} ({found.makespan:.2f})" + f" {found.label.split(',')[0]}" * name


def _seconds(rows: Sequence[Row], label: str) -> str:
    own = [row for row in rows if row.label == label]
    if not own:
        return "–"
    return f"{fmean(row.mean_program_s for row in own):.1f} / {fmean(row.makespan_s for row in own):.0f}"
