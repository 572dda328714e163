"""What reading a shared prefix once in decode steps is worth to programs, in simulation.

    python -m benchmarks.experiments.shared_prefix_simulated [--scale 0.3] [--seeds 2] [--jobs 2] [--out FILE]

The regimes of `what_pays`, 4 workers, with runtimes that read the KV of a shared prefix once per decode step
and with stock ones. The switch changes that one term of the engine model: a step reads the part of the radix
tree that its requests lock, and what each has beyond it, instead of the sum of their contexts.

With the switch on, preble_plan is also run with one thing less: not told of the switch, and without each of
the two mechanisms that hold requests back.
"""

import gc
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.experiments.what_pays import PROFILES, kv_tokens_of
from benchmarks.experiments.what_pays_report import GPUS
from benchmarks.program_shapes.regimes import REGIMES
from benchmarks.program_shapes.script import run_scripts
from preble_sgl.global_sched.admission import PLAN
from preble_sgl.profiles import load_profile
from preble_sgl.sim.points import Setting

RESULT = Path("benchmarks/results/shared_prefix_simulated.json")
POLICIES = ("preble_plan", "preble_e2", "cache_aware", "round_robin")
LESS: dict[str, dict[str, Any]] = {
    "not told": {"told_of_sharing": False},
    "without kv_room": {"mechanisms": replace(PLAN, kv_room=False)},
    "without late_binding": {"mechanisms": replace(PLAN, late_binding=False)},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a cell. `less`: what is different about preble_plan."""

    policy: str
    shared_prefix: bool
    less: str = ""
    changes: dict[str, Any] = field(default_factory=dict)


VARIANTS = [Variant(policy, shared) for policy in POLICIES for shared in (False, True)]
VARIANTS += [Variant("preble_plan", True, *less) for less in LESS.items()]


@dataclass(frozen=True, slots=True)
class Cell:
    """One regime, profile and seed, under every policy, with and without."""

    regime: str
    profile: str
    seed: int
    scale: float

    def setting(self, variant: Variant) -> Setting:
        """Return what is simulated."""
        return Setting(
            policy=variant.policy,
            gpus=GPUS,
            profile=load_profile(self.profile),
            seed=self.seed,
            kv_tokens=kv_tokens_of(self.profile, self.scale),
            shared_prefix=variant.shared_prefix,
            **variant.changes,
        )


def measure(cell: Cell) -> list[dict[str, Any]]:
    """Run a cell: the same programs under every policy, with and without."""
    regime = REGIMES[cell.regime]
    scripts, _ = regime.scripts(cell.regime, cell.setting(VARIANTS[0]))
    rows = []
    for variant in VARIANTS:
        summary = run_scripts(cell.setting(variant), scripts, rows=regime.rows).summary
        rows.append(
            {
                "regime": cell.regime,
                "profile": cell.profile,
                "seed": cell.seed,
                "policy": variant.policy,
                "shared_prefix": variant.shared_prefix,
                "less": variant.less,
                "makespan_s": summary.makespan_s,
                "mean_program_s": summary.mean_program_s,
            }
        )
        gc.collect()
    return rows


def effects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by regime and profile, how many times longer programs take without; means over seeds.

    `ratios`: without shared prefixes, by policy. `less`: preble_plan with one thing less, over all of it.
    """
    found = []
    for profile in dict.fromkeys(row["profile"] for row in rows):
        for regime in dict.fromkeys(row["regime"] for row in rows):
            of = [row for row in rows if (row["profile"], row["regime"]) == (profile, regime)]
            whole = Variant("preble_plan", True)
            ratios = {one: _ratio(of, Variant(one, False), Variant(one, True)) for one in POLICIES}
            less = {name: _ratio(of, Variant("preble_plan", True, name), whole) for name in LESS}
            found.append({"profile": profile, "regime": regime, "ratios": ratios, "less": less})
    return found


def _ratio(rows: Sequence[dict[str, Any]], variant: Variant, to: Variant) -> dict[str, float]:
    return {
        name: _mean(rows, variant, name) / _mean(rows, to, name) for name in ("makespan_s", "mean_program_s")
    }


def _mean(rows: Sequence[dict[str, Any]], variant: Variant, name: str) -> float:
    wanted = (variant.policy, variant.shared_prefix, variant.less)
    return fmean(row[name] for row in rows if (row["policy"], row["shared_prefix"], row["less"]) == wanted)


def main(
    scale: Annotated[float, typer.Option(help="Of KV caches and numbers of programs.")] = 0.3,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Simulate and keep the figures."""
    cells = [Cell(r, p, seed, scale) for p in PROFILES for seed in range(seeds) for r in REGIMES]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, cell) for cell in cells]
        shown = track(as_completed(futures), "simulating", len(cells), console=Console(stderr=True))
        for future in shown:
            rows += future.result()
    found = effects(rows)
    result = {
        "what": f"simulated, {GPUS} workers, lpm order; times without ÷ with",
        "scale": scale,
        "seeds": seeds,
        "effects": found,
        "rows": sorted(rows, key=lambda row: [str(value) for value in row.values()]),
    }
    out.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    best = max(one["ratios"]["preble_plan"]["makespan_s"] for one in found)
    print(orjson.dumps({"best_makespan_ratio": best}).decode())


if __name__ == "__main__":
    typer.run(main)
