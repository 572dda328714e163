"""Predicting a plan's reuse: the policy places the planned calls, with no runtime and no time passing.

Rows run side by side: the calls of all rows that wait for no other are placed first, row by row, then those
that wait for one call, and so on.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from preble_sgl.core import Placement, WorkerId
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.prefix_counts import reuse_limit
from preble_sgl.dsl.tracer import TracedCall
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.global_sched.scheduler import GlobalScheduler

_NOW = 0.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to predict for: its KV cache in tokens, its page size, and what its work costs."""

    worker_id: WorkerId
    kv_tokens: int
    page_size: int
    profile: CostProfile


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a policy would make of a plan, starting from empty caches."""

    policy: str
    prompt_tokens: int
    cached_tokens: int
    calls: Mapping[WorkerId, int]

    @property
    def hit_rate(self) -> float:
        """Cached share of the prompt tokens, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def describe(self) -> str:
        """Return which share of the prompts is reused, and how many calls each worker gets."""
        placed = ", ".join(f"{worker} {calls}" for worker, calls in sorted(self.calls.items()))
        kept = f"keeps {self.cached_tokens:,} ({self.hit_rate:.0%}) of {self.prompt_tokens:,} prompt tokens"
        return f"{self.policy} {kept}; calls: {placed or 'none'}"


def predict(plan: Plan, workers: Sequence[WorkerSpec], policy: str, *, seed: int = 0) -> Prediction:
    """Return what `policy` would reuse of `plan`'s prompts on `workers`. Deterministic."""
    scheduler = make_scheduler(policy, rng=random.Random(seed))
    for worker in workers:
        scheduler.on_worker_up(
            worker.worker_id,
            kv_tokens=worker.kv_tokens,
            page_size=worker.page_size,
            profile=worker.profile,
            now=_NOW,
        )
    for trace in plan.traces:
        for program_id in {call.request.program_id for call in trace.calls}:
            scheduler.register_plan(plan.hint(trace.row, program_id), _NOW)
    calls: Counter[WorkerId] = Counter()
    cached_tokens = 0
    for stage in _stages(plan):
        for worker_id, cached in _run_stage(scheduler, stage):
            calls[worker_id] += 1
            cached_tokens += cached
    return Prediction(policy, plan.prompt_tokens, cached_tokens, dict(calls))


def _stages(plan: Plan) -> list[list[TracedCall]]:
    """Return the calls by their depth."""
    stages: list[list[TracedCall]] = []
    for call in plan.calls:
        stages += [[] for _ in range(call.depth + 1 - len(stages))]
        stages[call.depth].append(call)
    return stages


def _run_stage(scheduler: GlobalScheduler, stage: Sequence[TracedCall]) -> list[tuple[WorkerId, int]]:
    """Place calls that are made together and finish them all; return each one's worker and cached tokens."""
    for call in stage:
        scheduler.submit(call.request, _NOW)
    calls = {call.request.request_id: call for call in stage}
    outcomes = []
    while started := _start_all(scheduler):
        for placement in started:
            call = calls[placement.request_id]
            cached = min(placement.matched_len, reuse_limit(call))
            scheduler.on_finish(placement.request_id, output=call.output, cached_tokens=cached, now=_NOW)
            outcomes.append((placement.worker_id, cached))
    return outcomes


def _start_all(scheduler: GlobalScheduler) -> list[Placement]:
    """Start what can start before anything ends."""
    placements: list[Placement] = []
    while started := scheduler.dispatch(_NOW):
        placements += started
        for placement in started:
            scheduler.on_first_token(placement.request_id, _NOW)
    return placements
