"""Markdown tables of the study "which mechanisms pay", from benchmarks/results/what_pays.json."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import orjson

from benchmarks.experiments.what_pays_report import (
    BEST,
    OURS,
    PLAIN,
    SHOWN,
    Ratio,
    Row,
    best,
    groups,
    ratio,
    read,
)
from benchmarks.markdown import table as _table


def what_pays(results: Path) -> str:
    """Baselines over preble_plan in every regime, and the ablations."""
    about, rows = read(results / "what_pays.json")
    made = f"`{about['command']}`; KV tokens per worker: {_listed(about['kv_tokens'])}."
    profiles = list(dict.fromkeys(row.profile for row in rows))
    return "\n\n".join(
        [made, *(_ratios(rows, profile) for profile in profiles), _ablations(rows, profiles[0])]
    )


def shared_prefix(results: Path) -> str:
    """How many times longer programs take where every request reads a shared prefix by itself."""
    about = orjson.loads((results / "shared_prefix_simulated.json").read_bytes())
    made = "`python -m benchmarks.experiments.shared_prefix_simulated"
    parts = [f"{made} --scale {about['scale']} --seeds {about['seeds']}`"]
    for profile in dict.fromkeys(one["profile"] for one in about["effects"]):
        effects = [one for one in about["effects"] if one["profile"] == profile]
        policies = list(effects[0]["ratios"])
        body = [[one["regime"], *(_effect(one["ratios"][name]) for name in policies)] for one in effects]
        parts.append(f"**{profile}**: without ÷ with\n\n{_table(['regime', *policies], body)}")
    less = list(about["effects"][0]["less"])
    body = [
        [one["profile"], one["regime"], *(_effect(one["less"][name]) for name in less)]
        for one in about["effects"]
    ]
    title = "**preble_plan with `shared_prefix` and one thing less**: less ÷ whole"
    parts.append(f"{title}\n\n{_table(['profile', 'regime', *less], body)}")
    return "\n\n".join(parts)


def _effect(ratios: dict[str, float]) -> str:
    return f"{ratios['mean_program_s']:.2f} ({ratios['makespan_s']:.2f})"


def _listed(kv_tokens: dict[str, int]) -> str:
    return ", ".join(f"{num:,} (`{name}`)" for name, num in kv_tokens.items())


def _ratios(rows: Sequence[Row], profile: str) -> str:
    header = ["regime", *PLAIN, *SHOWN.values(), "ours, s", "makespan ÷ bound"]
    body = []
    for (of, regime), own in groups(rows).items():
        if of == profile:
            compared = [_cell(ratio(own, label)) for label in PLAIN]
            compared += [_cell(best(own, *kinds), named=True) for kinds in BEST.values()]
            ours = [row for row in own if row.label == OURS]
            mean_s = f"{fmean(row.mean_program_s for row in ours):.1f}"
            bound = f"{fmean(row.makespan_s / row.bound_s for row in ours):.2f}"
            body.append([regime, *compared, mean_s, bound])
    return f"**{profile}**: baseline ÷ preble_plan\n\n{_table(header, body)}"


def _cell(found: Ratio | None, *, named: bool = False) -> str:
    if found is None:
        return ""
    spread = f" [{found.low:.2f}–{found.high:.2f}]" if found.low != found.high else ""
    name = f" {found.label.split(',')[0]}" if named else ""
    return f"{found.mean:.2f} ({found.makespan:.2f}){spread}{name}"


def _ablations(rows: Sequence[Row], profile: str) -> str:
    regimes = {
        regime: own
        for (of, regime), own in groups(rows).items()
        if of == profile and any(row.kind == "ablation" for row in own)
    }
    kept = [row for row in rows if row.kind == "ablation" or row.label in ("preble_e2", OURS)]
    labels = dict.fromkeys(row.label for row in kept)
    body = [[label, *(_seconds(own, label) for own in regimes.values())] for label in labels]
    title = f"**{profile}, ablations**: mean program latency / makespan, s"
    return f"{title}\n\n{_table(['variant', *regimes], body)}"


def _seconds(rows: Sequence[Row], label: str) -> str:
    own = [row for row in rows if row.label == label]
    if not own:
        return ""
    return f"{fmean(row.mean_program_s for row in own):.1f} / {fmean(row.makespan_s for row in own):.0f}"
