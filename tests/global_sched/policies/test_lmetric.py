"""The product of prefill tokens and batch size, worked out by hand."""

from preble_sgl.global_sched import make_policy
from tests.global_sched.policies.fleets import Fleet


def test_the_score_is_prefill_tokens_times_batch_size() -> None:
    fleet = Fleet([1, 4])
    fleet.workers["w0"].pending_prefill_tokens = 200
    fleet.cache("w1", "document:90")
    decision = fleet.choose(make_policy("lmetric"), "document:90 question:10")
    assert decision.costs == {"w0": (200 + 100) * 2, "w1": 10 * 5}
    assert (decision.worker_id, decision.reason) == ("w1", "least_cost")


def test_a_hit_is_left_once_its_worker_has_as_many_times_more_requests() -> None:
    fleet = Fleet([9, 0])
    fleet.cache("w0", "document:90")
    assert fleet.choose(make_policy("lmetric"), "document:90 question:11").costs == {"w0": 110, "w1": 101}
    fleet.workers["w0"].num_bound = 8
    assert fleet.choose(make_policy("lmetric"), "document:90 question:11").worker_id == "w0"


def test_an_idle_worker_is_charged_for_the_prompt() -> None:
    fleet = Fleet([0, 0])
    fleet.cache("w1", "document:90")
    assert fleet.choose(make_policy("lmetric"), "document:90 question:10").costs == {"w0": 100, "w1": 10}


def test_ties_are_drawn_by_the_fleets_rng() -> None:
    fleet = Fleet([0, 0, 5])
    assert {fleet.choose(make_policy("lmetric"), "new:10").worker_id for _ in range(30)} == {"w0", "w1"}
