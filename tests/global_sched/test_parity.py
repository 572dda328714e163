"""Without a plan and with room for everything, planning costs nothing against the best plain policies."""

import random

import pytest

from benchmarks.experiments.scheduler_throughput import WORKLOADS, Bench, single_turns

NUM_REQUESTS = 800


def hit_rate(policy: str, workload: str, seed: int) -> float:
    """Return the share of prompt tokens found cached when `NUM_REQUESTS` prompts pass through 8 workers."""
    bench = Bench(policy, 8)
    requests = bench.requests(single_turns(workload, random.Random(seed)), NUM_REQUESTS)
    bench.run(requests)
    workers = bench.scheduler.snapshot().workers
    return sum(worker.cached_tokens for worker in workers) / sum(worker.prompt_tokens for worker in workers)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("workload", sorted(WORKLOADS))
def test_preble_plan_reuses_what_the_best_plain_policies_reuse(workload: str, seed: int) -> None:
    plain = [hit_rate(policy, workload, seed) for policy in ("preble_e2", "sticky", "cache_aware")]
    assert hit_rate("preble_plan", workload, seed) > 0.95 * max(plain)
