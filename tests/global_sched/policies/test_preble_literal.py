"""Preble's code as it is. That `preble_e2` is free of the six confirmed defects is shown, under the same
numbers, in tests/global_sched/test_preble_defects.py."""

import sys
from dataclasses import replace
from types import FrameType

import pytest

from preble_sgl.core import RequestId, SamplingParams, WorkerId
from preble_sgl.global_sched.policies import Decision, Observer
from preble_sgl.global_sched.policies.preble_literal import PrebleLiteral
from preble_sgl.global_sched.policies.preble_literal_window import prefill_s
from tests.global_sched.policies.fleets import Fleet
from tests.global_sched.stories import request

PT_1000 = (0.10842571 * 1000 + 4.209777054806409 + 0.32) / 1e3 / 0.9
"""Preble's seconds for 1,000 new tokens at the start of a prompt: 0.1255."""


class Preble:
    """The policy and its fleet. Calls generate up to 1,000 tokens, at first priced at 0.15 s each."""

    def __init__(self, num_workers: int = 2) -> None:
        self.fleet = Fleet([0] * num_workers)
        self.policy = PrebleLiteral()
        self.placed: dict[str, Decision] = {}

    def call(self, name: str, text: str, *, max_new_tokens: int = 1000, namespace: str = "") -> Decision:
        asked = request(name, text, namespace=namespace)
        asked = replace(asked, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        self.placed[name] = self.fleet.choose(self.policy, asked)
        return self.placed[name]

    def finish(self, name: str, *, ttft_s: float = 1.0, decode_s: float = 0.0, output_len: int = 1) -> None:
        """End a request now; its first token came `decode_s` ago, `ttft_s` after its submission."""
        worker_id, now = self.placed[name].worker_id, self.fleet.now
        self.policy.on_first_token(RequestId(name), worker_id, ttft_s, now - decode_s)
        self.policy.on_finish(RequestId(name), worker_id, 0, output_len, now)

    def cancel(self, name: str, worker_id: WorkerId, *, failed: bool = False) -> None:
        self.policy.on_cancel(RequestId(name), worker_id, self.fleet.now, failed)

    def open(self, *workers: str) -> None:
        self.fleet.open_ids = list(workers)


def test_the_policy_listens() -> None:
    assert isinstance(PrebleLiteral(), Observer)


# Exploit and explore


def test_requests_on_one_document_follow_it_and_nothing_is_priced() -> None:
    preble = Preble()
    first = preble.call("a", "document:1000 a:10")
    assert (first.worker_id, first.reason, first.costs) == ("w0", "explore", {"w0": 0.0, "w1": 0.0})
    second = preble.call("b", "document:1000 b:10")
    assert (second.worker_id, second.reason, second.costs) == ("w0", "exploit", {})


def test_a_portion_costs_its_misses_and_its_unfinished_requests() -> None:
    preble = Preble()
    preble.call("a", "document:1000 a:10", max_new_tokens=10)
    preble.call("b", "document:1000 b:10", max_new_tokens=20)
    # The split leaves both requests with document:1000. Missed: 1010 + 10 of 2020 tokens. New:20 would evict
    # one leaf of 10 and then the other; small nodes cost nothing.
    costs = preble.call("new", "new:20").costs
    assert costs == {"w0": pytest.approx(1020 / 2020 * 2 * PT_1000 + 2 * 20 * 0.15), "w1": 0.0}


def test_a_victim_costs_its_prefill() -> None:
    preble = Preble()
    preble.call("a", "document:1000", max_new_tokens=0)
    # Once for its requests in the window and once more for being what new:1000 would evict.
    assert preble.call("new", "new:1000").costs == {"w0": pytest.approx(2 * PT_1000), "w1": 0.0}


def test_the_time_per_token_is_the_median_of_what_was_seen() -> None:
    preble = Preble()
    preble.call("a", "document:1000")
    preble.finish("a", decode_s=10.0, output_len=100)
    preble.call("b", "document:1000 b:10", max_new_tokens=1000)
    costs = preble.call("new", "new:5").costs
    # Missed: 1000 + 10 of 2010 tokens, counted again because new:5 would evict the document under b.
    assert costs == {"w0": pytest.approx(2 * 1010 / 2010 * 2 * PT_1000 + 1000 * (0.15 + 0.10) / 2), "w1": 0.0}


def test_namespaces_share_nothing() -> None:
    preble = Preble()
    assert preble.call("a", "document:1000 a:10").reason == "explore"
    assert preble.call("b", "document:1000 b:10", namespace="tenant").reason == "explore"
    assert preble.call("c", "document:1000 c:10", namespace="tenant").reason == "exploit"


def test_a_worker_that_drains_is_passed_over_and_one_that_is_gone_is_forgotten() -> None:
    preble = Preble(3)
    assert preble.call("a", "document:1000 a:10").worker_id == "w0"
    preble.open("w1", "w2")
    assert preble.call("b", "document:1000 b:10").worker_id == "w1"
    for name in ("w0", "w1"):
        preble.policy.on_worker_gone(preble.fleet.workers[name].worker_id)
    preble.finish("a")
    preble.open("w0", "w1", "w2")
    assert preble.call("new", "new:1000").costs == {"w0": 0.0, "w1": 0.0, "w2": 0.0}


def test_a_request_that_is_placed_again_or_ends_elsewhere_leaves_its_first_place() -> None:
    preble = Preble()
    assert preble.call("a", "document:1000").worker_id == "w0"
    preble.open("w1")
    assert preble.call("a", "document:1000").worker_id == "w1"
    w0 = preble.fleet.workers["w0"].worker_id
    preble.policy.on_finish(RequestId("a"), w0, cached_tokens=0, output_len=1, now=0.0)
    preble.open("w0", "w1")
    costs = preble.call("new", "new:1").costs
    assert max(costs.values()) < 1.0  # no decoding


# The six confirmed defects


def test_defect_1_a_prefix_on_workers_2_and_3_is_sent_to_their_places_in_the_list() -> None:
    preble = Preble(4)
    for worker in ("w2", "w3"):
        preble.open(worker)
        preble.call(worker, f"document:1000 {worker}:10")
    preble.open("w0", "w1", "w2", "w3")
    decisions = [preble.call(f"r{number}", f"document:1000 r{number}:10") for number in range(6)]
    assert list(decisions[0].costs) == ["w2", "w3"]
    assert [decision.worker_id for decision in decisions] == ["w0", "w0", "w1", "w1", "w2", "w3"]
    assert {decision.reason for decision in decisions} == {"exploit"}


def test_defect_2_a_full_hit_is_explored_and_sent_round() -> None:
    preble = Preble(4)
    decisions = [preble.call(f"r{number}", "prompt:1500") for number in range(8)]
    assert [decision.worker_id for decision in decisions] == ["w0", "w1", "w2", "w3"] * 2
    assert {decision.reason for decision in decisions} == {"explore"}


@pytest.mark.parametrize(("end", "seconds"), [("finish", 0.0), ("cancel", 150.0)])
def test_defect_3_a_request_that_is_cancelled_weighs_for_ever(end: str, seconds: float) -> None:
    preble = Preble()
    worker_id = preble.call("a", "document:1000").worker_id
    preble.finish("a") if end == "finish" else preble.cancel("a", worker_id)
    assert preble.call("new", "new:1000").costs[worker_id] == pytest.approx(seconds + 2 * PT_1000)


def test_defect_3_after_a_request_that_failed_every_priced_selection_raises() -> None:
    preble = Preble()
    worker_id = preble.call("a", "document:1000").worker_id
    preble.cancel("a", worker_id, failed=True)
    for number in range(2):
        with pytest.raises(TypeError):
            preble.call(f"new{number}", "new:1000")


def test_defect_4_prefill_of_361_to_383_tokens_costs_less_than_nothing() -> None:
    assert [new_len for new_len in range(1, 2000) if prefill_s(new_len, new_len) < 0] == [*range(361, 384)]
    assert prefill_s(375, 375) == pytest.approx(-9.92e-3, abs=1e-5)
    preble = Preble()
    preble.call("a", "document:375", max_new_tokens=0)
    # A worker with that work is lighter than an idle one.
    assert preble.call("b", "other:375").worker_id == "w0"


@pytest.mark.parametrize(("finished_at", "seconds"), [(170.0, 0.0), (190.0, 150.0)])
def test_defect_5_a_finish_after_the_window_is_the_last_that_is_heard(
    finished_at: float, seconds: float
) -> None:
    preble = Preble()
    preble.call("slow", "document:1000")
    preble.fleet.now = finished_at
    other = preble.call("other", "other:1000").worker_id
    preble.finish("slow")
    preble.finish("other")
    assert preble.call("new", "new:1").costs[other] == pytest.approx(seconds + 2 * PT_1000)


def num_calls(num_documents: int) -> int:
    """Count the Python calls of one explored request after so many others."""
    preble, total = Preble(), 0
    for number in range(num_documents):
        preble.call(f"r{number}", f"text{number}:50")

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal total
        total += event == "call"

    sys.setprofile(count)
    try:
        preble.call("last", "last:50")
    finally:
        sys.setprofile(None)
    return total


def test_defect_6_a_decision_in_a_tree_ten_times_as_large_takes_over_five_times_the_steps() -> None:
    assert num_calls(400) > 5 * num_calls(40)


# Other differences from the paper


def test_the_cost_of_the_request_itself_is_left_out() -> None:
    preble = Preble()
    assert preble.call("a", "document:30000").costs == {"w0": 0.0, "w1": 0.0}


def test_the_limit_of_a_request_is_taken_for_its_output_length() -> None:
    for max_new_tokens in (10, 1000):
        preble = Preble()
        preble.call("a", "document:1000", max_new_tokens=max_new_tokens)
        cost = preble.call("new", "new:1").costs[preble.placed["a"].worker_id]
        assert cost == pytest.approx(PT_1000 * 2 + max_new_tokens * 0.15)


# Stealing


def loaded(num_a: int, num_b: int) -> Preble:
    """Return two workers of which w0 has served all so far; the documents a and b cost only prefill."""
    preble = Preble()
    preble.open("w0")
    for name, num_requests in (("a", num_a), ("b", num_b)):
        for number in range(num_requests):
            preble.call(f"{name}{number}", f"{name}:1000 {name}{number}:10", max_new_tokens=0)
    preble.open("w0", "w1")
    return preble


def test_the_cheapest_portion_of_the_heaviest_worker_goes_to_the_lightest() -> None:
    preble = loaded(num_a=30, num_b=69)
    assert preble.call("b", "b:1000 last:10", max_new_tokens=0).worker_id == "w0"
    # Missed by a: 1010 + 29 * 10 = 1300 tokens; by b: 1010 + 69 * 10 = 1700. Costs are in proportion, so when
    # w1 has a, w0 is not 1.5 times as heavy any more and b stays.
    assert preble.call("next a", "a:1000 next:10", max_new_tokens=0).worker_id == "w1"
    assert preble.call("next b", "b:1000 next:10", max_new_tokens=0).worker_id == "w0"


def test_nothing_is_stolen_before_the_fiftieth_request_per_worker() -> None:
    preble = loaded(num_a=30, num_b=68)
    preble.call("b", "b:1000 last:10", max_new_tokens=0)
    assert preble.call("next a", "a:1000 next:10", max_new_tokens=0).worker_id == "w0"


def test_a_portion_is_not_stolen_if_that_turned_the_tables() -> None:
    preble = loaded(num_a=0, num_b=99)
    preble.call("b", "b:1000 last:10", max_new_tokens=0)
    assert preble.call("next b", "b:1000 next:10", max_new_tokens=0).worker_id == "w0"


@pytest.mark.parametrize(("ttft_s", "holders"), [(1.9, []), (2.0, ["w0", "w1"])])
def test_a_single_portion_is_shared_when_its_first_token_times_have_doubled(
    ttft_s: float, holders: list[str]
) -> None:
    preble = loaded(num_a=99, num_b=0)
    preble.finish("a0", ttft_s=1.0)
    preble.fleet.now = 100.0
    preble.finish("a1", ttft_s=ttft_s)
    preble.call("last", "a:1000 last:10", max_new_tokens=0)
    assert list(preble.call("next", "a:1000 next:10").costs) == holders


def test_a_long_chain_steals_nothing() -> None:
    preble = loaded(num_a=30, num_b=66)
    text = "b:1000 turn0:10"
    for turn in range(1, 4):
        preble.call(f"turn{turn}", text, max_new_tokens=0)
        text += f" turn{turn}:10"
    preble.call("fourth node below b", text, max_new_tokens=0)
    assert preble.call("next a", "a:1000 next:10", max_new_tokens=0).worker_id == "w0"
