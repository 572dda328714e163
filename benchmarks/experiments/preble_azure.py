"""Preble's figure 4, simulated: ToolBench and VideoQA at the arrivals of two Azure services, four A6000.

    python -m benchmarks.experiments.preble_azure [--quick] [--seeds 5] [--jobs 2] [--out FILE]

400 tools at 4.7 requests per second, as bursty as Azure's code completion (gaps with a coefficient of
variation of about 11), and 300 videos at 7.1 per second, as regular as its conversations. Gaps are drawn from
the traces' quantiles, not replayed, so that a seed may have a burst or a lull that another has not. Lower
rates are added because the simulated workers are overloaded where the authors' own were not.
`--quick`: two seeds, a fifth of the time; it writes nothing unless --out says where.
"""

import heapq
from collections.abc import Mapping
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from benchmarks.rows import BASE, POLICIES, Row, Study, about, cells, conclude, mean, ratio, side_by_side
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import Setting
from preble_sgl.sim.points import simulate as simulate_point
from preble_sgl.sim.workloads import Session

RESULT = Path("benchmarks/results/preble_azure")
PROFILE = "a6000-mistral-7b"
WORKERS = 4
DURATION_S = 300.0
MIX = {"toolbench": ("azure_code", 4.7), "videoqa": ("azure_conv", 7.1)}
"""Arrivals and requests per second."""

FULL_RPS = sum(rps for _, rps in MIX.values())

SHARES = (0.5, 0.75, 1.0)
"""Of those rates."""

METRICS = {"mean_s": "average latency", "p99_s": "p99 latency", "ttft_s": "TTFT", "tpot_s": "TPOT"}
PAPER: Mapping[str, float] = {"mean_s": 6.02, "p99_s": 4.61, "ttft_s": 2.42, "tpot_s": 5.60}
"""SGLang behind round robin over Preble, figure 4."""

AUTHORS_LOG_S: Mapping[str, float] = {"mean_s": 1.939, "p99_s": 14.92, "ttft_s": 0.418, "tpot_s": 0.0532}
"""Seconds of Preble on real GPUs, in a log in the history of its repository (4,025 requests in 297 s)."""

AUTHORS_RPS = 13.55


class Run(NamedTuple):
    """One point to simulate."""

    policy: str
    share: float
    seed: int
    duration_s: float


def simulate(run: Run) -> Row:
    """Return what comes of a run."""
    mixed = arrivals(run)
    summary = simulate_point(
        Setting(policy=run.policy, gpus=WORKERS, profile=load_profile(PROFILE), seed=run.seed),
        (session for _, session in mixed),
        (at for at, _ in mixed),
        num_requests=len(mixed),
    )
    return Row.of(
        summary,
        hardware="4xa6000",
        workload="azure mix",
        variant="lpm",
        rps=run.share * FULL_RPS,
        policy=run.policy,
        seed=run.seed,
    )


def arrivals(run: Run) -> list[tuple[float, Session]]:
    """Return the sessions of both loads and when they come, in order."""
    streams = []
    for workload, (kind, rps) in MIX.items():
        load = Load(workload=workload, rps=run.share * rps, arrivals=kind, scale_gpus=WORKERS)
        sessions, times = load.play(run.seed)
        streams.append(zip(times, sessions, strict=False))
    merged = heapq.merge(*streams, key=itemgetter(0))
    return list(takewhile(lambda one: one[0] < run.duration_s, merged))


def table(study: Study) -> Table:
    """Return seconds, and round robin over each policy, beside the paper's."""
    shown = Table(title="simulated: Azure mix, 4 × A6000; seconds (round robin over the policy)")
    for column in ("req/s", "policy", *METRICS.values(), "hit rate"):
        shown.add_column(column)
    for cell, policies in cells(study.rows).items():
        for policy, rows in policies.items():
            texts = [f"{mean(rows, m):.3f} ({ratio(policies[BASE], rows, m):.2f})" for m in METRICS]
            shown.add_row(f"{cell.rps:g}", policy, *texts, f"{mean(rows, 'hit_rate'):.1%}")
    authors = [f"{AUTHORS_LOG_S[metric]:g} ({PAPER[metric]:g})" for metric in METRICS]
    shown.add_row(f"{AUTHORS_RPS}", "Preble, real GPUs", *authors)
    return shown


def headline(study: Study) -> dict[str, dict[str, dict[str, float]]]:
    """Return round robin over each policy by rate, and the paper's."""
    ratios = {
        f"{cell.rps:g}/s": {
            policy: {metric: round(ratio(policies[BASE], rows, metric), 2) for metric in METRICS}
            for policy, rows in policies.items()
        }
        for cell, policies in cells(study.rows).items()
    }
    return ratios | {"paper": {"preble": dict(PAPER)}}


def main(
    quick: Annotated[bool, typer.Option(help="Two seeds, a fifth of the time.")] = False,
    seeds: Annotated[int, typer.Option()] = 5,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where .json goes.")] = None,
) -> None:
    """Simulate, print and keep the result."""
    began_at = perf_counter()
    seeds, duration_s = (2, 0.2 * DURATION_S) if quick else (seeds, DURATION_S)
    runs = [
        Run(policy, share, seed, duration_s)
        for share in SHARES
        for policy in POLICIES
        for seed in range(seeds)
    ]
    command = "preble_azure" + " --quick" * quick
    facts = about(command, [load_profile(PROFILE)], quick=quick, seeds=seeds, duration_s=duration_s)
    study = Study(facts, side_by_side(simulate, runs, jobs))
    last_line = {"label": "simulated", "headline": headline(study)}
    kept = out or (None if quick else RESULT)
    conclude(study, table(study), last_line, began_at=began_at, jobs=jobs, out=kept)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
