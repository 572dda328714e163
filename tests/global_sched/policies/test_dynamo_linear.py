"""Dynamo's cost in blocks of 16 tokens: prompts of 160 tokens have ten."""

from collections import Counter
from math import exp

import pytest

from preble_sgl.core import RequestId, WorkerId
from preble_sgl.global_sched.policies import Observer
from preble_sgl.global_sched.policies.dynamo_linear import DynamoLinear, prompt_blocks
from tests.global_sched.policies.fleets import Fleet
from tests.global_sched.stories import request

W0, W1 = WorkerId("w0"), WorkerId("w1")


def finish(policy: DynamoLinear, request_id: str, worker_id: WorkerId = W1) -> None:
    policy.on_finish(RequestId(request_id), worker_id, cached_tokens=0, output_len=5, now=0.0)


def hit_on_w1() -> tuple[Fleet, DynamoLinear]:
    """Return a fleet in which w1 has half of a document and serves a request on all of it."""
    fleet, policy = Fleet([0, 0]), DynamoLinear()
    fleet.cache("w1", "document:80")
    decision = fleet.choose(policy, request("a", "document:160"))
    assert (decision.worker_id, decision.reason) == ("w1", "least_cost")
    assert decision.costs == {"w0": 10 + 10, "w1": 5 + 10}
    return fleet, policy


def test_blocks_that_unfinished_requests_share_count_once() -> None:
    fleet, policy = hit_on_w1()
    assert fleet.choose(policy, "document:160").costs == {"w0": 10 + 10, "w1": 5 + 10}
    assert fleet.choose(policy, "other:160").costs == {"w0": 10 + 10, "w1": 10 + 20}


def test_pending_prefill_counts_and_pages_only_where_they_are_full() -> None:
    fleet, policy = Fleet([0, 0]), DynamoLinear()
    fleet.workers["w0"].pending_prefill_tokens = 32
    assert fleet.choose(policy, "new:24").costs == {"w0": 56 / 16 + 1, "w1": 24 / 16 + 1}


def test_the_weight_multiplies_prefill_alone() -> None:
    fleet = Fleet([0, 0])
    fleet.cache("w1", "document:80")
    assert fleet.choose(DynamoLinear(overlap_weight=3.0), "document:160").costs == {"w0": 40, "w1": 25}


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_a_request_that_ends_frees_its_blocks(end: str) -> None:
    fleet, policy = hit_on_w1()
    finish(policy, "a") if end == "finish" else policy.on_cancel(RequestId("a"), W1, 0.0, False)
    assert fleet.choose(policy, "other:160").costs == {"w0": 20, "w1": 20}


def test_a_request_that_is_placed_again_moves_its_blocks() -> None:
    fleet, policy = hit_on_w1()
    fleet.open_ids = ["w0"]
    assert fleet.choose(policy, request("a", "document:160")).worker_id == "w0"
    fleet.open_ids = ["w0", "w1"]
    assert fleet.choose(policy, "other:160").costs == {"w0": 30, "w1": 20}


def test_a_worker_that_is_gone_takes_its_blocks_with_it() -> None:
    fleet, policy = hit_on_w1()
    policy.on_worker_gone(W1)
    finish(policy, "a")
    assert fleet.choose(policy, "other:160").costs == {"w0": 20, "w1": 20}


def test_the_end_of_a_request_that_another_policy_placed_is_no_news() -> None:
    policy = DynamoLinear()
    assert isinstance(policy, Observer)
    policy.on_first_token(RequestId("stranger"), W0, queueing_s=1.0, now=1.0)
    finish(policy, "stranger")


def test_blocks_are_full_and_know_their_namespace_and_all_in_front_of_them() -> None:
    blocks = prompt_blocks(request("r", "document:47"))
    assert len(set(blocks)) == 2
    assert blocks == prompt_blocks(request("r", "document:32 tail:10"))
    assert not set(blocks) & set(prompt_blocks(request("r", "document:47", namespace="tenant")))
    assert not set(blocks) & set(prompt_blocks(request("r", "header:16 document:47")))


def test_ties_are_drawn() -> None:
    fleet = Fleet([0, 0])
    assert {fleet.choose(DynamoLinear(), "new:160").worker_id for _ in range(20)} == {"w0", "w1"}


def test_above_temperature_0_the_dearest_of_two_is_drawn_with_odds_of_exp_minus_its_inverse() -> None:
    fleet = Fleet([0, 0])
    fleet.cache("w1", "document:80")
    policies = [DynamoLinear(temperature=1.0) for _ in range(2000)]
    counts = Counter(fleet.choose(policy, "document:160").worker_id for policy in policies)
    assert counts[W0] / counts[W1] == pytest.approx(exp(-1), rel=0.1)
