"""The plain policies, and the registry."""

import pytest

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError
from preble_sgl.global_sched import POLICIES, CostProfile, make_policy
from tests.global_sched.stories import ONE_SECOND_PER_TOKEN, Story


def test_every_policy_is_made_by_its_name() -> None:
    assert [make_policy(name).name for name in POLICIES] == list(POLICIES)


def test_an_unknown_policy_is_refused_with_the_names() -> None:
    with pytest.raises(InputError, match="preble_plan, preble_e2, preble_literal, round_robin, least_load"):
        make_policy("best")


def test_round_robin_takes_the_workers_in_turn() -> None:
    story = Story("round_robin", ["w0", "w1", "w2"])
    assert [story.call(f"r{i}", f"r{i}:10").worker_id for i in range(5)] == ["w0", "w1", "w2", "w0", "w1"]


def test_round_robin_keeps_its_turn_when_workers_come_and_go() -> None:
    story = Story("round_robin", ["w0", "w1", "w2"])
    story.call("a", "a:10")
    story.call("b", "b:10")
    story.scheduler.on_worker_down(WorkerId("w1"), story.now)
    story.dispatch()
    assert story.worker_of("b") == "w2"
    story.up("w3")
    assert [story.call(name, f"{name}:10").worker_id for name in "cde"] == ["w3", "w0", "w2"]


def test_a_prefix_on_another_worker_is_not_taken_for_cached() -> None:
    story = Story("round_robin", prefix_first=False)
    story.run("a", "document:100")
    for name in "bc":
        assert story.call(name, f"document:100 {name}:10").matched_len == (0 if name == "b" else 100)
    story.call("d", "document:100 d:10")
    assert [worker.pending_prefill_tokens for worker in story.scheduler.snapshot().workers] == [10, 220]


def test_least_load_weighs_work_and_not_requests() -> None:
    story = Story("least_load", profile=ONE_SECOND_PER_TOKEN)
    story.call("long", "long:500")
    assert [story.call(f"r{i}", f"r{i}:100").worker_id for i in range(3)] == ["w1", "w1", "w1"]
    assert story.placed["r2"].costs == {"w0": 545.0, "w1": 290.0}
    assert story.call("last", "last:100").costs == {"w0": 545.0, "w1": 435.0}


def test_least_load_counts_only_what_is_unfinished() -> None:
    story = Story("least_load", profile=ONE_SECOND_PER_TOKEN)
    story.run("done", "done:500")
    assert story.call("next", "next:10").worker_id == "w0"


def test_least_load_gives_a_fast_worker_more() -> None:
    story = Story("least_load", ["slow"], profile=ONE_SECOND_PER_TOKEN)
    story.profile = CostProfile(
        name="fast", source="test", floor_s=0.0, base_s=0.0, token_s=0.25, decode_token_s=0.25
    )
    story.up("tast")
    workers = [story.call(f"r{i}", f"r{i}:55").worker_id for i in range(5)]
    assert workers == ["slow", "tast", "tast", "tast", "tast"]
