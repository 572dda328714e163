"""The defects that were confirmed by running Preble's own scheduler, each shown absent from preble_e2."""

import random
import sys
from types import FrameType

import pytest

from preble_sgl.core import WorkerId
from preble_sgl.global_sched import make_policy
from preble_sgl.global_sched.policies import FleetView
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.worker import OutputLengths, Worker
from tests.global_sched.stories import A6000_MISTRAL_7B, Story, prompt, request


def test_defect_1_a_prefix_on_workers_2_and_3_is_exploited_there_and_not_by_index() -> None:
    ids = [WorkerId(f"w{i}") for i in range(4)]
    tree = RadixTree(window_s=180.0)
    for worker_id in ids:
        tree.add_worker(worker_id, capacity=100_000)
    for worker_id in ids[2:]:
        tree.insert("", prompt("document:1000").tobytes(), worker_id)
    workers = [
        Worker(worker_id, 100_000, 1, A6000_MISTRAL_7B, OutputLengths(), tree.cache(worker_id))
        for worker_id in ids
    ]
    fleet = FleetView(workers, tree, 0.0, random.Random(0))
    policy, asked = make_policy("preble_e2"), request("r", "document:1000 question:50")
    match = tree.match("", asked.prompt.tobytes())
    for heavier, chosen in ((2, "w3"), (3, "w2")):
        workers[heavier].recent_prefill_s += 2.0
        assert policy.choose(asked, match, fleet).worker_id == chosen


def test_defect_2_a_full_hit_is_exploited_and_not_sent_round() -> None:
    story = Story("preble_e2", ["w0", "w1", "w2", "w3"], profile=A6000_MISTRAL_7B)
    placements = [story.run(f"r{i}", "prompt:1500", output="answer:10") for i in range(8)]
    assert [placement.worker_id for placement in placements] == ["w0"] * 8
    assert [placement.reason for placement in placements] == ["explore"] + ["exploit"] * 7
    assert [placement.matched_len for placement in placements] == [0] + [1499] * 7


def test_defect_3_a_request_that_fails_does_not_poison_the_next() -> None:
    story = Story("preble_e2", profile=A6000_MISTRAL_7B)
    story.call("before first token", "document:1000 a:10")
    story.cancel("before first token")
    story.call("after first token", "document:1000 b:10")
    story.first_token("after first token")
    story.cancel("after first token")
    story.call("without output", "document:1000 c:10")
    story.finish("without output", output="")
    assert story.call("next", "document:1000 d:10").matched_len == 1000


def test_defect_4_prefill_never_costs_less_than_nothing_nor_less_than_fewer_tokens() -> None:
    costs = [A6000_MISTRAL_7B.prefill_s(new_len) for new_len in range(0, 2000)]
    assert costs == sorted(costs)
    assert min(costs[361:384]) > 0.02


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_defect_5_a_request_may_end_long_after_it_left_the_window(end: str) -> None:
    story = Story("preble_e2", profile=A6000_MISTRAL_7B, window_s=180.0)
    story.call("slow", "document:1000 a:10")
    story.now = 170.0
    story.call("other", "other:1000")
    story.now = 400.0
    story.finish("other")
    story.finish("slow", output="answer:100") if end == "finish" else story.cancel("slow")
    story.now = 401.0
    assert story.call("next", "new:1000").reason == "explore"


def num_calls(num_documents: int) -> int:
    """Count the Python calls of 50 explored requests after so many others that the caches are full."""
    story = Story("preble_e2", profile=A6000_MISTRAL_7B, kv_tokens=num_documents * 25)
    total = 0

    def serve(name: str) -> None:
        asked = request(name, f"{name}:50")
        story.scheduler.submit(asked, 0.0)
        story.scheduler.dispatch(0.0)
        story.scheduler.on_finish(asked.request_id, output=prompt("answer:5"), cached_tokens=0, now=0.0)

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal total
        total += event == "call"

    for number in range(2 * num_documents):
        serve(f"text{number}")
    sys.setprofile(count)
    try:
        for number in range(50):
            serve(f"counted{number}")
    finally:
        sys.setprofile(None)
    return total


def test_defect_6_a_decision_in_a_large_tree_takes_no_more_steps_than_in_a_small_one() -> None:
    assert num_calls(num_documents=2000) <= 1.1 * num_calls(num_documents=40)
