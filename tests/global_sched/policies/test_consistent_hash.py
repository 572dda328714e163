"""The hash ring: who owns a prompt, what moves when workers come and go, and the bound."""

import random
from math import ceil

from preble_sgl.global_sched import make_policy
from tests.global_sched.policies.fleets import Fleet
from tests.global_sched.stories import request


def owners(fleet: Fleet, num_prompts: int) -> list[str]:
    policy = make_policy("consistent_hash")
    return [fleet.choose(policy, f"prompt{number}:10").worker_id for number in range(num_prompts)]


def test_the_owner_of_a_prompt_is_the_same_in_every_process() -> None:
    assert owners(Fleet([0, 0, 0]), 8) == ["w1", "w0", "w2", "w1", "w1", "w1", "w2", "w2"]


def test_only_the_first_256_tokens_and_the_namespace_decide() -> None:
    fleet, policy = Fleet([0, 0, 0, 0]), make_policy("consistent_hash")
    starts = {fleet.choose(policy, f"header:256 tail{n}:100").worker_id for n in range(20)}
    assert len(starts) == 1
    assert len({fleet.choose(policy, f"header:255 tail{n}:100").worker_id for n in range(20)}) == 4
    spaces = [request(f"r{n}", "header:256", namespace=f"tenant{n}") for n in range(20)]
    assert len({fleet.choose(policy, asked).worker_id for asked in spaces}) == 4


def test_a_prompt_overflows_to_the_same_neighbour_every_time_and_returns() -> None:
    fleet, policy = Fleet([0, 0, 0, 0]), make_policy("consistent_hash")
    first = fleet.choose(policy, "document:300")
    assert first.reason == "affinity"
    fleet.workers[first.worker_id].num_bound = 1  # ceil(1.25 * 2 / 4) = 1 is the limit now
    overflow = [fleet.choose(policy, "document:300") for _ in range(3)]
    assert {decision.reason for decision in overflow} == {"overflow"}
    assert len({decision.worker_id for decision in overflow} - {first.worker_id}) == 1
    fleet.workers[first.worker_id].num_bound = 0
    assert fleet.choose(policy, "document:300") == first


def test_an_owner_may_have_a_quarter_more_than_the_average_and_no_more() -> None:
    fleet, policy = Fleet([8, 8, 8, 8]), make_policy("consistent_hash")
    owner = fleet.choose(policy, "document:300").worker_id
    placed = [fleet.place(policy, "document:300") for _ in range(6)]
    # Limits: ceil(1.25 * m / 4) for m = 33 ... 38 is 11, 11, 11, 12, 12, 12.
    assert [worker_id == owner for worker_id in placed] == [True, True, True, True, False, False]
    assert fleet.workers[owner].num_bound == 12


def test_the_bound_holds_after_every_placement() -> None:
    rng = random.Random(1)
    fleet, policy = Fleet([0] * 5), make_policy("consistent_hash")
    unfinished: list[str] = []
    for _ in range(2000):
        worker_id = fleet.place(policy, f"prompt{int(rng.expovariate(0.3))}:20")
        unfinished.append(worker_id)
        assert fleet.workers[worker_id].num_bound <= ceil(1.25 * len(unfinished) / 5)
        for _ in range(rng.choice([0, 1, 1, 2]) if len(unfinished) > 1 else 0):
            if unfinished:
                done = unfinished.pop(rng.randrange(len(unfinished)))
                fleet.workers[done].num_bound -= 1


def test_a_worker_that_joins_takes_its_share_and_nothing_else_moves() -> None:
    fleet = Fleet([0] * 5)
    fleet.open_ids.remove("w4")
    before = owners(fleet, 2000)
    fleet.open_ids.append("w4")
    after = owners(fleet, 2000)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"w4"}
    assert len(moved) < 1.25 * 2000 / 5


def test_when_a_worker_leaves_only_its_prompts_move() -> None:
    fleet = Fleet([0] * 5)
    before = owners(fleet, 2000)
    fleet.open_ids.remove("w2")
    after = owners(fleet, 2000)
    assert {old for old, new in zip(before, after, strict=True) if old != new} == {"w2"}
    assert "w2" not in after
