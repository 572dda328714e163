"""The regimes of the study "which mechanisms pay": a shape, its size for a fleet, and how it arrives.

Sizes follow the KV cache of the fleet, so that the pressure on it is the same for every profile and scale.
Loads are shares of what `bound.py` says the fleet could do at best, so that 1.6 is beyond any scheduler.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.program_shapes.bound import least_makespan_s
from benchmarks.program_shapes.script import Script
from benchmarks.program_shapes.shapes import (
    agents,
    hot_judge,
    judge,
    questions,
    sessions,
    spread,
    tenants,
    tree,
)
from preble_sgl.sim.points import Setting
from preble_sgl.sim.workloads import loogle, toolbench

Make = Callable[[random.Random, int], list[Script]]
"""Makes scripts for a fleet with so many KV tokens."""

AGENT_LEN = 10_000
"""Tokens of an agent's conversation at its end, about."""


@dataclass(frozen=True, slots=True)
class Regime:
    """`load`: share of the fleet's best rate at which programs arrive; None: all are there at the start.

    `rows`: how many programs the client runs at a time, None for all.
    """

    make: Make
    load: float | None = None
    rows: int | None = None

    def scripts(self, name: str, setting: Setting) -> tuple[list[Script], float]:
        """Return what runs in a setting, with its seed, and the least makespan were it all there at once."""
        rng = random.Random(f"{name} {setting.seed}")
        kv_tokens = setting.gpus * (setting.kv_tokens or setting.profile.kv_tokens)
        made = self.make(rng, kv_tokens)
        bound_s = least_makespan_s(setting, made)
        return (made if self.load is None else spread(rng, made, bound_s / self.load)), bound_s


def _tenants(rng: random.Random, kv_tokens: int) -> list[Script]:
    num = max(12, kv_tokens // 400)
    return tenants(rng, [(toolbench(), num), (loogle(), num // 6)], num // 24, num_steps=(4, 10))


REGIMES: dict[str, Regime] = {
    "judge, unordered": Regime(lambda rng, kv: questions(rng, 2 * kv)),
    "judge, in order": Regime(lambda rng, kv: judge(rng, 2 * kv), rows=512),
    "judge, 10 hot documents": Regime(lambda rng, kv: hot_judge(rng, max(2, kv // 2500)), rows=512),
    "tree of thought": Regime(lambda rng, kv: tree(rng, max(2, kv // 12_000)), rows=128),
    "agents, thrashing": Regime(lambda rng, kv: agents(rng, max(2, 3 * kv // AGENT_LEN))),
    "agents, no pressure": Regime(lambda rng, kv: agents(rng, max(2, kv // 3 // AGENT_LEN))),
    "tenants, overload": Regime(_tenants, load=1.6),
    "tenants, moderate": Regime(_tenants, load=0.5),
    "toolbench": Regime(lambda rng, kv: sessions(rng, toolbench(), max(10, kv // 500)), load=0.4),
    "long documents": Regime(lambda rng, kv: sessions(rng, loogle(), max(10, kv // 1500)), load=0.7),
}

OPEN_LOOP = tuple(name for name, regime in REGIMES.items() if regime.load is not None)
"""Regimes whose decodes stall behind the prefills of what arrives meanwhile, unless chunks are mixed."""

ABLATED = (
    "judge, unordered",
    "judge, 10 hot documents",
    "tree of thought",
    "agents, thrashing",
    "long documents",
)
"""Regimes in which mechanisms are switched one at a time."""
