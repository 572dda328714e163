"""The demo's programs on two real CPU runtimes under each policy, in turn: medians and spread.

    python -m benchmarks.experiments.two_runtimes [--rounds 5] [--kv-tokens 4096] [--out FILE]

Every round runs every policy once, each after a cache flush; the order rotates from round to round. Token
counts are SGLang's own. Wall time is of this machine, with a tiny model on its CPU cores: SGLang's CPU
attention reads a cached prefix again in full, so saved prefill shows less in it than on a GPU.
"""

import asyncio
import platform
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated

import orjson
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from preble_sgl.commands.demo import Outcome, demo_jobs, explain_jobs, run_jobs
from preble_sgl.fleet import Fleet

RESULT = Path("benchmarks/results/two_runtimes")
POLICIES = ("preble_plan", "preble_e2", "sticky", "cache_aware", "least_load", "round_robin")


async def measure(rounds: int, kv_tokens: int | None) -> tuple[dict[str, list[Outcome]], int]:
    """Return the outcomes of each policy, and the predicted cached tokens."""
    jobs = demo_jobs()
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    async with Fleet.launch(kv_tokens=kv_tokens) as fleet:
        predicted = await explain_jobs(fleet, jobs)
        await run_jobs(fleet, jobs, "preble_e2", progress=False)  # compiles grammars, fills page caches
        for number in range(rounds):
            turn = number % len(POLICIES)
            for policy in POLICIES[turn:] + POLICIES[:turn]:
                await fleet.flush_cache()
                outcomes[policy].append(await run_jobs(fleet, jobs, policy, progress=False))
    return outcomes, predicted


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    """Return medians, and the smallest and largest wall time."""
    walls = [outcome.wall_s for outcome in outcomes]
    return {
        "prompt_tokens": median(outcome.usage.prompt_tokens for outcome in outcomes),
        "cached_tokens": median(outcome.usage.cached_tokens for outcome in outcomes),
        "computed_tokens": median(outcome.usage.computed_tokens for outcome in outcomes),
        "mean_program_s": round(median(outcome.mean_program_s for outcome in outcomes), 2),
        "wall_s": round(median(walls), 2),
        "wall_min_s": round(min(walls), 2),
        "wall_max_s": round(max(walls), 2),
    }


def table(summaries: dict[str, dict[str, float]]) -> Table:
    """Return the summaries side by side."""
    shown = Table(title="two real CPU runtimes, the demo's programs")
    for column in ("policy", "computed tokens", "cached tokens", "program s", "wall s (median, range)"):
        shown.add_column(column)
    for policy, row in summaries.items():
        wall = f"{row['wall_s']} ({row['wall_min_s']}–{row['wall_max_s']})"
        shown.add_row(
            policy,
            f"{row['computed_tokens']:,.0f}",
            f"{row['cached_tokens']:,.0f}",
            f"{row['mean_program_s']}",
            wall,
        )
    return shown


def plot(summaries: dict[str, dict[str, float]], path: Path) -> None:
    """Draw computed tokens and wall time per policy."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(summaries)[::-1]
    panels = {"computed_tokens": "computed prompt tokens", "wall_s": "wall time, s"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(names, [summaries[name][key] for name in names], color="#4477aa")
        axis.bar_label(bars, fmt="{:,.4g}" if key == "wall_s" else "{:,.0f}", padding=3)
        axis.set_title(f"{title} (less is better)", fontsize=10)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yticklabels([])
    figure.savefig(path)


def main(
    rounds: Annotated[int, typer.Option()] = 5,
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache of each runtime, in tokens.")] = None,
    out: Annotated[Path, typer.Option(help="Where .json and .svg go.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    outcomes, predicted = asyncio.run(measure(rounds, kv_tokens))
    summaries = {policy: summary(outcomes[policy]) for policy in POLICIES}
    Console().print(table(summaries))
    kv = f" --kv-tokens {kv_tokens}"
    result = {
        "rows": summaries,
        "predicted_cached_tokens": predicted,
        "rounds": rounds,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, SGLang 0.5.23 on the CPU",
        "kv_tokens": kv_tokens,
        "command": f"python -m benchmarks.experiments.two_runtimes --rounds {rounds}{kv * bool(kv_tokens)}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    plot(summaries, out.with_suffix(".svg"))
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    typer.run(main)
