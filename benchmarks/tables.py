"""Markdown tables of docs/results-simulated.md, each a function of the folder with the result files.

Cells are means over seeds, ± half their range where there is more than one seed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.experiments import preble_azure, preble_figure3, preble_notebook
from benchmarks.markdown import table as _table
from benchmarks.rows import (
    BASE,
    METRICS,
    OURS,
    POLICIES,
    SIMPLE,
    Cell,
    Cells,
    Compared,
    Row,
    Study,
    Win,
    cells,
    mean,
    ranges,
    ratio,
    simple_wins,
    spread,
)
from benchmarks.study_tables import shared_prefix, what_pays

SHORT = {"mean_s": "mean", "p99_s": "p99"}
PAPER_APPS = {"mean_s": (1.56, 1.8), "p99_s": (3.0, 4.0)}
"""The only workload for which the paper prints its own ratios (section 4.3)."""


def runs(results: Path) -> str:
    """How each result was made."""
    lines = []
    for name in ("preble_figure3", "preble_figure5", "preble_azure", "preble_notebook"):
        about = Study.read(results / f"{name}.json").about
        reduced = " (**reduced run**: shorter, fewer rates and seeds)" if about["quick"] else ""
        lines.append(f"- `{about['command']}`: {_seeds(about['seeds'])}, {_durations(about)}{reduced}")
    return "\n".join(lines)


def profiles(results: Path) -> str:
    """Where the timing comes from and how far off it is."""
    about = Study.read(results / "preble_figure3.json").about
    return "\n".join(f"- `{name}`: {error}" for name, error in about["profiles"].items())


def latency(hardware: str, results: Path) -> str:
    """Mean and p99 of every policy at a low, a middle and a high rate, a table per workload."""
    groups = _by_workload(_figure3(results), hardware)
    return "\n\n".join(f"**{workload}**\n\n{_latencies(group)}" for workload, group in groups.items())


def headline(metric: str, results: Path) -> str:
    """Round robin over each policy, from the least to the greatest over the rates, beside the paper's."""
    spans = ranges(_figure3(results))
    body = []
    for where in dict.fromkeys(compared[:3] for compared in spans if compared.metric == metric):
        found = [spans[Compared(*where, policy)] for policy in POLICIES[1:]]
        paper = _span(PAPER_APPS[metric]) if where[1] == "apps" else ""
        body.append([where[0], where[1], *map(_span, found), paper])
    overall = []
    for policy in POLICIES[1:]:
        of_policy = [span for compared, span in spans.items() if (compared[2:]) == (metric, policy)]
        overall.append(_span((min(low for low, _ in of_policy), max(high for _, high in of_policy))))
    body.append(["**all**", "", *overall, _span(preble_figure3.PAPER[metric])])
    return _table(["hardware", "workload", *POLICIES[1:], "paper"], body)


def wins(results: Path) -> str:
    """Where a simple baseline is better than preble_e2 or preble_plan."""
    found: dict[tuple[str, str, str], dict[str, list[Win]]] = {}
    for win in simple_wins(_figure3(results)):
        where = (win.cell.hardware, win.cell.workload, SHORT[win.metric])
        found.setdefault(where, {}).setdefault(win.ours, []).append(win)
    body = [
        [*where, *(_listed(of_ours.get(ours, [])) for ours in OURS)]
        for where, of_ours in sorted(found.items())
    ]
    return _table(["hardware", "workload", "latency", *(f"better than {ours}" for ours in OURS)], body)


def wins_count(results: Path) -> str:
    """How often a simple baseline is better than ours, and the other way round."""
    grouped = _figure3(results)
    won = list(simple_wins(grouped))
    num = len(grouped) * len(METRICS)
    body = []
    for ours in OURS:
        for simple in SIMPLE:
            factors = [win.factor for win in won if (win.ours, win.simple) == (ours, simple)]
            most = f"{max(factors):.2f}×" if factors else "–"
            body.append([simple, ours, f"{len(factors)} of {num}", most])
    return _table(["baseline", "against", "is better in", "at most by"], body)


def ladder(results: Path) -> str:
    """Figure 5: what each part of E2 adds."""
    body = []
    for cell, rungs in cells(Study.read(results / "preble_figure5.json").rows).items():
        for rung, rows in rungs.items():
            latencies = [text for metric in METRICS for text in _with_ratio(rungs[BASE], rows, metric)]
            body.append([f"{cell.rps:g}", rung, *latencies, f"{mean(rows, 'hit_rate'):.1%}"])
    return _table(["req/s", "", "mean, s", "gain", "p99, s", "gain", "hit rate"], body)


def variants(results: Path) -> str:
    """Mean latency of every policy under other local schedulers, at the middle rate on four A6000."""
    study = Study.read(results / "preble_figure3.json")
    grouped = cells(row for row in study.rows if row.hardware == preble_figure3.VARIANTS_ON)
    middles = {(cell.workload, cell.rps) for cell in grouped if cell.variant != preble_figure3.LPM}
    body = [
        [f"{cell.workload}, {cell.rps:g}/s", cell.variant, *_best(policies, POLICIES, "mean_s")]
        for cell, policies in sorted(grouped.items(), key=_workload_first)
        if (cell.workload, cell.rps) in middles
    ]
    return _table(["workload", "scheduling", *POLICIES], body)


def azure(results: Path) -> str:
    """Figure 4's mix: seconds, and round robin over each policy in brackets."""
    body = []
    for cell, policies in cells(Study.read(results / "preble_azure.json").rows).items():
        for policy, rows in policies.items():
            texts = [
                f"{_value(rows, metric)} ({ratio(policies[BASE], rows, metric):.2f})"
                for metric in preble_azure.METRICS
            ]
            body.append([f"{cell.rps:g}", policy, *texts, f"{mean(rows, 'hit_rate'):.1%}"])
    measured = [
        f"{preble_azure.AUTHORS_LOG_S[metric]:g} ({preble_azure.PAPER[metric]:g})"
        for metric in preble_azure.METRICS
    ]
    body.append([f"{preble_azure.AUTHORS_RPS}", "*Preble, measured by its authors*", *measured, ""])
    names = (f"{name}, s" for name in preble_azure.METRICS.values())
    return _table(["req/s", "policy", *names, "hit rate"], body)


def notebook(results: Path) -> str:
    """Simulated beside measured mean latencies of three systems as the authors ran them."""
    measured = preble_notebook.measured()
    body = []
    for cell, systems in cells(Study.read(results / "preble_notebook.json").rows).items():
        texts: list[str] = []
        for system, rows in systems.items():
            truth = measured[(cell.hardware, cell.workload, cell.rps, system)]
            texts += [_value(rows, "mean_s"), f"{truth:g}", f"{mean(rows, 'mean_s') / truth:.2f}"]
        body.append([cell.hardware, cell.workload, f"{cell.rps:g}", *texts])
    names = [
        text for name in preble_notebook.SYSTEMS for text in (f"{name}: simulated, s", "measured, s", "ratio")
    ]
    return _table(["hardware", "workload", "req/s", *names], body)


TABLES: Mapping[str, Callable[[Path], str]] = {
    "runs": runs,
    "profiles": profiles,
    **{f"latency_{hardware}": partial(latency, hardware) for hardware in preble_figure3.HARDWARE},
    **{f"headline_{SHORT[metric]}": partial(headline, metric) for metric in METRICS},
    "simple_wins": wins,
    "simple_wins_count": wins_count,
    "figure5": ladder,
    "variants": variants,
    "azure": azure,
    "notebook": notebook,
    "what_pays": what_pays,
    "shared_prefix": shared_prefix,
}
"""What stands between the markers of each name."""


# Figure 3


def _figure3(results: Path) -> Cells:
    rows = Study.read(results / "preble_figure3.json").rows
    return cells(row for row in rows if row.variant == preble_figure3.LPM)


def _by_workload(grouped: Cells, hardware: str) -> dict[str, Cells]:
    found: dict[str, dict[Cell, Mapping[str, Sequence[Row]]]] = {}
    for cell, policies in grouped.items():
        if cell.hardware == hardware:
            found.setdefault(cell.workload, {})[cell] = policies
    return dict(found)


def _latencies(group: Cells) -> str:
    """Return the table of one workload, a row per policy; the best of each column is bold."""
    chosen = _low_middle_high(sorted(group, key=lambda cell: cell.rps))
    titles = [f"{SHORT[metric]} at {cell.rps:g}/s, s" for cell in chosen for metric in METRICS]
    columns = [_best(group[cell], POLICIES, metric) for cell in chosen for metric in METRICS]
    hits = [f"{mean(group[chosen[-1]][policy], 'hit_rate'):.0%}" for policy in POLICIES]
    failed = {policy: sum(row.failed for cell in group for row in group[cell][policy]) for policy in POLICIES}
    names = [policy + f" ({failed[policy]} failed)" * bool(failed[policy]) for policy in POLICIES]
    body = list(zip(names, *columns, hits, strict=True))
    return _table(["policy", *titles, f"hit rate at {chosen[-1].rps:g}/s"], body)


def _low_middle_high(ordered: Sequence[Cell]) -> list[Cell]:
    return list(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))


def _best(policies: Mapping[str, Sequence[Row]], names: Sequence[str], metric: str) -> list[str]:
    """Return a cell per policy, the least in bold, and all that show the same number."""
    least = min(mean(policies[name], metric) for name in names)
    texts = [_value(policies[name], metric) for name in names]
    best = [_number(mean(policies[name], metric)) == _number(least) for name in names]
    return [f"**{text}**" if bold else text for text, bold in zip(texts, best, strict=True)]


def _listed(found: Iterable[Win]) -> str:
    """Return which baselines win at which rates, with the greatest factor."""
    by_simple: dict[str, list[Win]] = {}
    for win in found:
        by_simple.setdefault(win.simple, []).append(win)
    return "; ".join(
        f"{simple} at {', '.join(f'{win.cell.rps:g}' for win in of)} (≤ {max(win.factor for win in of):.2f}×)"
        for simple, of in by_simple.items()
    )


def _workload_first(item: tuple[Cell, object]) -> tuple[int, float, int]:
    cell = item[0]
    order = list(preble_figure3.DURATION_S)
    return order.index(cell.workload), cell.rps, list(preble_figure3.VARIANTS).index(cell.variant)


# Text


def _with_ratio(base: Sequence[Row], rows: Sequence[Row], metric: str) -> tuple[str, str]:
    return _value(rows, metric), f"{ratio(base, rows, metric):.2f}×"


def _value(rows: Sequence[Row], metric: str) -> str:
    text = _number(mean(rows, metric))
    return f"{text} ± {_number(spread(rows, metric))}" if len(rows) > 1 else text


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]:.2f}–{span[1]:.2f}"


def _seeds(num: int) -> str:
    return "1 seed" if num == 1 else f"{num} seeds"


def _durations(about: Mapping[str, object]) -> str:
    durations = about.get("durations_s")
    if isinstance(durations, dict):
        return "arrivals for " + ", ".join(f"{value:g} s ({name})" for name, value in durations.items())
    return f"arrivals for {about['duration_s']:g} s"
