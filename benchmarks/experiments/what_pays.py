"""Which scheduling mechanisms pay, in simulation: programs of ten regimes under every policy, and ablations.

    python -m benchmarks.experiments.what_pays [--quick] [--scale 1.0] [--seeds 3] [--jobs 2] [--out FILE]

Everything is simulated: 4 workers, `lpm` as the local order for all. Every baseline also runs behind a limit
of K open programs, the best K being picked in hindsight, and once as today's routers work, without holding
requests back for a prefix that another one is computing. `--scale` scales KV caches and numbers of programs
together: pressure stays, decode batches shrink. `--quick`: scale 0.3, one seed, one profile.
"""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.experiments import what_pays_report as report
from benchmarks.program_shapes.regimes import ABLATED, OPEN_LOOP, REGIMES
from benchmarks.program_shapes.script import Outcome, Script, run_scripts
from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.core import RequestRecord
from preble_sgl.global_sched.admission import PLAN, Mechanisms, Objective
from preble_sgl.profiles import load_profile
from preble_sgl.sim.points import Setting
from preble_sgl.sim.report import program_latencies

RESULT = Path("benchmarks/results/what_pays")
PROFILES = {"a6000-mistral-7b": 1.0, "h100-llama3-8b": 0.5}
"""Profiles, and the share of their KV caches that is used: so that a full run takes a quarter of an hour."""

LIMITS = (16, 32, 64, 128)
SWITCHES = tuple(name for name, value in asdict(PLAN).items() if value is True)
"""Mechanisms that preble_plan has, whichever they are."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to schedule. `kind` says what it is compared as."""

    label: str
    kind: report.Kind
    policy: str
    objective: Objective = "throughput"
    mechanisms: Mechanisms | None = None
    prefix_first: bool = True


def plain() -> Iterator[Candidate]:
    """Yield the policies as they are, and preble_plan with either objective."""
    for policy in report.PLAIN:
        yield Candidate(policy, "plain", policy)
    yield Candidate(report.OURS, "ours", "preble_plan")
    yield Candidate("preble_plan, latency", "ours", "preble_plan", "latency")


def limited() -> Iterator[Candidate]:
    """Yield the baselines behind a limit of open programs."""
    for policy in ("cache_aware", "sticky", "preble_e2"):
        for limit in LIMITS:
            yield Candidate(f"{policy}@{limit}", "limited", f"{policy}@{limit}")


def as_routers() -> Iterator[Candidate]:
    """Yield the policies without what this project's scheduler does for any of them."""
    for policy in report.PLAIN:
        yield Candidate(f"{policy}, as routers do", "router", policy, prefix_first=False)


def ablations() -> Iterator[Candidate]:
    """Yield preble_plan with one mechanism less, and preble_e2 with one after the other."""
    for switch in SWITCHES:
        less = replace(PLAN, **{switch: False})  # type: ignore[arg-type]
        yield Candidate(f"plan without {switch}", "ablation", "preble_plan", mechanisms=less)
    late = Mechanisms(late_binding=True)
    added = {
        "late": late,
        "late + depth_first": replace(late, depth_first=True),
        "late + kv_room": replace(late, kv_room=True),
        "all": PLAN,
    }
    for name, mechanisms in added.items():
        yield Candidate(f"E2 + {name}", "ablation", "preble_e2", mechanisms=mechanisms)


@dataclass(frozen=True, slots=True)
class Cell:
    """One regime, profile and seed, under every candidate."""

    regime: str
    profile: str
    seed: int
    scale: float
    mixed_chunk: bool = False
    ablate: bool = False

    def candidates(self) -> list[Candidate]:
        """Return what is compared here. With mixed chunks only the policies as they are."""
        if self.mixed_chunk:
            return list(plain())
        return [*plain(), *limited(), *as_routers(), *(ablations() if self.ablate else ())]

    def setting(self, candidate: Candidate) -> Setting:
        """Return what is simulated."""
        profile = load_profile(self.profile)
        return Setting(
            policy=candidate.policy,
            gpus=report.GPUS,
            profile=profile,
            seed=self.seed,
            mixed_chunk=self.mixed_chunk,
            kv_tokens=kv_tokens_of(self.profile, self.scale),
            objective=candidate.objective,
            mechanisms=candidate.mechanisms,
            prefix_first=candidate.prefix_first,
        )


def kv_tokens_of(profile: str, scale: float) -> int:
    """Return the size of a worker's KV cache."""
    return round(load_profile(profile).kv_tokens * PROFILES[profile] * scale)


def measure(cell: Cell) -> list[report.Row]:
    """Run a cell: the same programs under every candidate."""
    gc.set_threshold(*GC_THRESHOLDS)
    candidates, regime = cell.candidates(), REGIMES[cell.regime]
    scripts, bound_s = regime.scripts(cell.regime, cell.setting(candidates[0]))
    rows = []
    for one in candidates:
        outcome = run_scripts(cell.setting(one), scripts, rows=regime.rows)
        rows.append(_row(cell, one, scripts, bound_s, outcome))
        gc.collect()  # engines and schedulers refer to each other
    return rows


def _row(
    cell: Cell, candidate: Candidate, scripts: Sequence[Script], bound_s: float, outcome: Outcome
) -> report.Row:
    summary, records = outcome.summary, outcome.records
    assert summary.finished == sum(script.num_calls for script in scripts)
    return report.Row(
        regime=cell.regime + ", mixed chunks" * cell.mixed_chunk,
        profile=cell.profile,
        seed=cell.seed,
        label=candidate.label,
        kind=candidate.kind,
        bound_s=bound_s,
        num_programs=len(scripts),
        num_calls=summary.finished,
        mean_program_s=summary.mean_program_s,
        p99_program_s=summary.p99_program_s,
        makespan_s=summary.makespan_s,
        mean_request_s=summary.mean_e2e_s,
        hit_rate=summary.hit_rate,
        imbalance=summary.imbalance,
        busy_share=outcome.busy_share,
        computed_tokens=sum(record.usage.computed_tokens for record in records),
        unsent_s=fmean(record.placed_at - record.submitted_at for record in records),
        prefill_s=fmean(record.first_token_at - record.placed_at for record in records),
        decode_s=fmean(record.finished_at - record.first_token_at for record in records),
        tenant_s=_tenant_latencies(scripts, records),
    )


def _tenant_latencies(scripts: Sequence[Script], records: Sequence[RequestRecord]) -> dict[str, float]:
    """Return the mean program latency of each tenant."""
    by_tenant: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        by_tenant[scripts[int(record.program_id, 16)].tenant].append(record)
    return {tenant: fmean(program_latencies(own)) for tenant, own in sorted(by_tenant.items())}


def cells(profiles: Sequence[str], seeds: int, scale: float) -> list[Cell]:
    """Return what is to be run. Ablations are of the first profile only."""
    found = []
    for profile in profiles:
        for seed in range(seeds):
            for regime in REGIMES:
                ablate = regime in ABLATED and profile == profiles[0]
                found.append(Cell(regime, profile, seed, scale, ablate=ablate))
            found += [Cell(regime, profile, seed, scale, mixed_chunk=True) for regime in OPEN_LOOP]
    return found


def run_cells(todo: Sequence[Cell], jobs: int) -> list[report.Row]:
    """Run cells side by side, in processes; return their rows in order. The longest regimes begin first."""
    order = sorted(range(len(todo)), key=lambda i: (todo[i].mixed_chunk, not todo[i].ablate))
    found: dict[int, list[report.Row]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(measure, todo[i]): i for i in order}
        shown = track(as_completed(futures), "simulating", len(todo), console=Console(stderr=True))
        for future in shown:
            found[futures[future]] = future.result()
    return [row for i in range(len(todo)) for row in found[i]]


def main(
    quick: Annotated[bool, typer.Option(help="Scale 0.3, one seed, the first profile.")] = False,
    scale: Annotated[float, typer.Option(help="Of KV caches and numbers of programs.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where .json and .svg go; nowhere if --quick.")] = None,
) -> None:
    """Simulate, print and keep the result."""
    profiles = list(PROFILES)
    if quick:
        profiles, seeds, scale = profiles[:1], 1, 0.3
    rows = run_cells(cells(profiles, seeds, scale), jobs or os.cpu_count() or 1)
    console = Console(width=190)
    for profile in profiles:
        console.print(report.ratio_table(rows, profile))
    console.print(report.ablation_table(rows, profiles[0]))
    result = {
        "what": f"simulated, {report.GPUS} workers, lpm order",
        "kv_tokens": {name: kv_tokens_of(name, scale) for name in profiles},
        "ratios": report.ratios(rows),
        "scale": scale,
        "seeds": seeds,
        "command": "python -m benchmarks.experiments.what_pays"
        + (" --quick" if quick else f" --scale {scale} --seeds {seeds}"),
    }
    if out or not quick:
        path = out or RESULT
        report.write(path.with_suffix(".json"), result, rows)
        report.plot(rows, path.with_suffix(".svg"))
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
