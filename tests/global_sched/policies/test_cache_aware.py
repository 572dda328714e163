"""The gateways' rule, on both sides of each of its three thresholds."""

import pytest

from preble_sgl.global_sched import make_policy
from preble_sgl.global_sched.policies import Decision
from tests.global_sched.policies.fleets import Fleet
from tests.global_sched.stories import request


def decide(fleet: Fleet, text: str) -> tuple[str, str]:
    decision = fleet.choose(make_policy("cache_aware"), text)
    return decision.worker_id, decision.reason


@pytest.mark.parametrize(("own", "decision"), [(69, ("w1", "exploit")), (70, ("w0", "explore"))])
def test_the_cache_decides_above_three_tenths_of_the_prompt(own: int, decision: tuple[str, str]) -> None:
    fleet = Fleet([0, 0])
    fleet.cache("w1", "document:30")
    assert decide(fleet, f"document:30 question:{own}") == decision


def test_the_longest_match_wins_whatever_the_queues() -> None:
    fleet = Fleet([0, 60, 20])
    fleet.cache("w1", "document:60")
    fleet.cache("w2", "document:50")
    assert decide(fleet, "document:60 question:40") == ("w1", "exploit")


def test_equal_matches_go_to_the_shorter_queue() -> None:
    fleet = Fleet([3, 2, 2])
    for worker in ("w0", "w1", "w2"):
        fleet.cache(worker, "document:60")
    fleet.cache("w1", "other:500")
    assert decide(fleet, "document:60 question:40") == ("w2", "exploit")


def test_a_miss_goes_to_the_shortest_queue_and_then_to_the_smallest_cache() -> None:
    fleet = Fleet([1, 0, 0])
    fleet.cache("w1", "other:500")
    assert decide(fleet, "new:100") == ("w2", "explore")
    fleet.workers["w2"].num_bound = 1
    assert decide(fleet, "new:100") == ("w1", "explore")


@pytest.mark.parametrize(
    ("queues", "decision"),
    [
        ([64, 0], ("w0", "exploit")),  # 64 more is not more than 64
        ([65, 0], ("w1", "balance")),
        ([201, 134], ("w0", "exploit")),  # 201 is not more than 1.5 * 134
        ([202, 134], ("w1", "balance")),
    ],
)
def test_uneven_queues_override_the_cache(queues: list[int], decision: tuple[str, str]) -> None:
    fleet = Fleet(queues)
    fleet.cache("w0", "document:100")
    assert decide(fleet, "document:100 question:10") == decision


def test_costs_are_the_queues() -> None:
    fleet = Fleet([2, 1])
    decision = fleet.choose(make_policy("cache_aware"), "new:10")
    assert decision == Decision(fleet.workers["w1"].worker_id, "explore", decision.costs)
    assert decision.costs == {"w0": 2, "w1": 1}


def test_the_cache_of_another_namespace_or_of_a_worker_that_drains_does_not_count() -> None:
    fleet = Fleet([0, 1, 1])
    fleet.cache("w1", "document:100", namespace="tenant")
    fleet.cache("w2", "document:100")
    fleet.open_ids.remove("w2")
    assert decide(fleet, "document:100 question:10") == ("w0", "explore")
    asked = request("r", "document:100 question:10", namespace="tenant")
    assert fleet.choose(make_policy("cache_aware"), asked).worker_id == "w1"
