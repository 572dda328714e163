"""random and power_of_two: what they draw, and that a seed decides all of it."""

from collections import Counter

import pytest

from preble_sgl.global_sched import make_policy
from tests.global_sched.policies.fleets import Fleet


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_a_seed_decides_all_draws(name: str) -> None:
    draws = []
    for _ in range(2):
        fleet = Fleet([0, 0, 0], seed=7)
        draws.append([fleet.place(make_policy(name), "prompt:10") for _ in range(50)])
    assert draws[0] == draws[1]
    assert set(draws[0]) == {"w0", "w1", "w2"}


def test_random_gives_each_worker_about_the_same_whatever_its_load() -> None:
    fleet = Fleet([100, 0])
    counts = Counter(str(fleet.choose(make_policy("random"), "prompt:10").worker_id) for _ in range(1000))
    assert 450 < counts["w0"] < 550


def test_of_two_workers_power_of_two_always_takes_the_lighter() -> None:
    fleet = Fleet([3, 2])
    decisions = [fleet.choose(make_policy("power_of_two"), "prompt:10") for _ in range(20)]
    assert {decision.worker_id for decision in decisions} == {"w1"}
    assert decisions[0].costs == {"w0": 3, "w1": 2}
    assert decisions[0].reason == "power_of_two"


def test_power_of_two_never_takes_the_heaviest_of_three_and_sometimes_the_middle_one() -> None:
    fleet = Fleet([9, 5, 1])
    counts = Counter(
        str(fleet.choose(make_policy("power_of_two"), "prompt:10").worker_id) for _ in range(900)
    )
    assert counts.keys() == {"w1", "w2"}
    assert 250 < counts["w1"] < 350


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_a_worker_that_drains_is_never_drawn(name: str) -> None:
    fleet = Fleet([9, 0, 9])
    fleet.open_ids.remove("w1")
    assert "w1" not in {fleet.choose(make_policy(name), "prompt:10").worker_id for _ in range(50)}
