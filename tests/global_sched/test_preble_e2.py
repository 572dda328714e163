"""E2's decisions in stories small enough to work out by hand. Unless said otherwise a token costs a second
to prefill and nothing to decode, so that every cost is a number of tokens."""

import random

import pytest

from preble_sgl.core import Placement, RequestId, WorkerId
from preble_sgl.global_sched import CostProfile, GlobalScheduler
from preble_sgl.global_sched.policies.preble_e2 import PrebleE2
from tests.global_sched.stories import FREE_DECODE, ONE_SECOND_PER_TOKEN, Story

MILLISECOND_PER_TOKEN = CostProfile(
    name="test", source="round numbers", floor_s=0.0, base_s=0.0, token_s=0.001, decode_token_s=0.0
)

FREE = CostProfile(name="test", source="zero", floor_s=0.0, base_s=0.0, token_s=0.0, decode_token_s=0.0)


def e2(
    workers: int = 2,
    *,
    profile: CostProfile = FREE_DECODE,
    kv_tokens: int = 1_000_000,
    window_s: float = 180.0,
    policy: PrebleE2 | None = None,
) -> Story:
    story = Story("preble_e2", [], profile=profile, kv_tokens=kv_tokens, window_s=window_s)
    if policy is not None:
        story.scheduler = GlobalScheduler(policy, rng=random.Random(0), window_s=window_s)
    for i in range(workers):
        story.up(f"w{i}")
    return story


def seen(placement: Placement) -> tuple[str, str, dict[WorkerId, float]]:
    return placement.worker_id, placement.reason, dict(placement.costs)


# Exploit and explore


def test_with_empty_caches_requests_spread_evenly_and_at_once() -> None:
    story = e2()
    assert seen(story.call("a", "a:1000")) == ("w0", "explore", {"w0": 1000, "w1": 1000})
    assert seen(story.call("b", "b:1000")) == ("w1", "explore", {"w0": 2000, "w1": 1000})
    assert seen(story.call("c", "c:1000")) == ("w0", "explore", {"w0": 2000, "w1": 2000})


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_documents_behind_one_short_system_prompt_spread_evenly_in_a_burst(workers: int) -> None:
    story = e2(workers)
    for number in range(4 * workers):
        story.submit(f"d{number}", f"system:100 document{number}:1000")
    while started := story.dispatch():
        for request_id in started:
            story.scheduler.on_first_token(RequestId(request_id), story.now)
    placed = [story.worker_of(f"d{number}") for number in range(4 * workers)]
    assert {worker: placed.count(worker) for worker in placed} == {f"w{i}": 4 for i in range(workers)}


def test_calls_follow_their_document() -> None:
    story = e2()
    homes = [story.run(f"d{n}", f"document{n}:1000").worker_id for n in range(4)]
    assert homes == ["w0", "w1", "w0", "w1"]
    for number in range(4):
        for call in range(5):
            placement = story.run(f"d{number}c{call}", f"document{number}:1000 question{number}.{call}:50")
            assert (placement.worker_id, placement.reason) == (homes[number], "exploit")
            assert placement.matched_len == 1000


def test_calls_follow_a_document_that_is_still_pending() -> None:
    story = e2()
    for document in range(2):
        for call in range(5):
            story.submit(f"d{document}c{call}", f"document{document}:1000 question{document}.{call}:50")
    assert story.dispatch() == ["d0c0", "d1c0"]
    assert story.first_token("d1c0") == ["d1c1", "d1c2", "d1c3", "d1c4"]
    assert story.first_token("d0c0") == ["d0c1", "d0c2", "d0c3", "d0c4"]
    assert {story.worker_of(f"d0c{call}") for call in range(5)} == {"w0"}
    assert {story.worker_of(f"d1c{call}") for call in range(5)} == {"w1"}


def test_exploiting_takes_more_cached_than_missed_tokens() -> None:
    story = e2()
    story.run("a", "document:100")
    assert story.call("half", "document:100 b:100").reason == "explore"
    assert story.call("more", "document:100 c:99").reason == "exploit"


def test_a_conversation_stays_where_its_last_turn_is_cached() -> None:
    story = e2()
    text = "turn0:200"
    for turn in range(1, 8):
        placement = story.run(f"t{turn}", text, output=f"answer{turn}:50")
        assert placement.worker_id == "w0"
        story.run(f"other{turn}", f"other{turn}:200")
        text += f" answer{turn}:49 turn{turn}:30"
    assert placement.matched_len == len(story.requests["t7"].prompt) - 30


def test_a_worker_that_joins_late_gets_new_prefixes_and_no_old_ones() -> None:
    story = e2(1)
    story.run("a", "document:1000")
    story.up("w1")
    assert story.call("b", "document:1000 question:50").worker_id == "w0"
    assert story.call("c", "other:1000").worker_id == "w1"


# The terms of LoadCost


def test_load_counts_prefill_and_the_average_output_of_recent_requests() -> None:
    story = e2(profile=ONE_SECOND_PER_TOKEN)
    story.run("a", "a:100", output="answer:10")
    story.run("b", "b:300", output="answer:30")
    placement = story.call("c", "c:50")
    assert placement.costs == {"w0": 100 + 20 + 50, "w1": 300 + 20 + 50}


def test_load_of_a_hit_is_only_what_it_misses() -> None:
    story = e2()
    story.run("a", "document:1000")
    story.run("b", "document:1000 question:50")
    assert story.call("c", "c:10").costs == {"w0": 1000 + 50 + 10, "w1": 10}


def test_eviction_costs_what_the_victims_are_used_for() -> None:
    story = e2(kv_tokens=1000)
    story.run("a0", "a:400 x:200")
    story.run("a1", "a:400 y:200")
    story.run("a2", "a:400 z:200")
    # w0 holds a(400) x(200) y(200) z(200) and is full; w1 is empty.
    placement = story.call("new", "new:500")
    # 500 tokens: x, y and z go, each used by one of three recent requests.
    assert placement.costs == {"w0": (600 + 200 + 200) + (200 + 200 + 200) / 3 + 500, "w1": 500}


def test_a_victim_used_by_all_costs_its_whole_prefill() -> None:
    story = e2(kv_tokens=700)
    story.run("a", "a:600")
    assert story.call("new", "new:500").costs == {"w0": 600 + 600 + 500, "w1": 500}


def test_the_expected_output_needs_room_too() -> None:
    story = e2(kv_tokens=700)
    story.run("a", "a:600", output="answer:101")
    assert story.call("new", "new:1").costs == {"w0": 600 + 600 + 100 + 1, "w1": 1}


def test_evicting_its_own_prefix_costs_a_request_nothing() -> None:
    story = e2(kv_tokens=700)
    story.run("a", "document:600")
    assert story.call("b", "document:600 question:200").costs[WorkerId("w0")] == 600 + 200


# Prefill/decode balancing


def decode_heavy(hits: int, policy: PrebleE2 | None = None) -> Story:
    """w0 decodes (one prefix, many hits), w1 has prefilled 210 tokens. All outputs are 10 tokens long."""
    story = e2(profile=ONE_SECOND_PER_TOKEN, policy=policy)
    story.run("d", "document:20", output="answer:10")
    story.run("big", "big:210", output="answer:10")
    for number in range(hits):
        assert story.run(f"h{number}", "document:20", output="answer:10").worker_id == "w0"
    return story


def test_an_explored_prefill_goes_to_the_worker_that_only_decodes() -> None:
    story = decode_heavy(hits=18)
    # L0 = 20 + 18 + 19 * 10 = 228, of it 190 decode; L1 = 210 + 10.
    assert seen(story.call("new", "new:100")) == ("w0", "balance", {"w0": 328, "w1": 320})


def test_a_worker_too_heavy_gets_no_prefill_however_much_it_decodes() -> None:
    story = decode_heavy(hits=40)
    # L0 = 20 + 40 + 41 * 10 = 470, more than 1.5 * 220.
    assert seen(story.call("new", "new:100"))[:2] == ("w1", "explore")


def test_where_all_workers_decode_much_nothing_is_out_of_balance() -> None:
    story = e2(profile=ONE_SECOND_PER_TOKEN)
    for number in range(6):
        placement = story.run(f"r{number}", f"r{number}:5", output=f"answer{number}:100")
        assert (placement.worker_id, placement.reason) == (f"w{number % 2}", "explore")


# After the choice


def test_a_shared_header_with_long_tails_spreads_once_waiting_exceeds_recomputing() -> None:
    story = e2()
    for name in "abcd":
        story.submit(name, f"header:2400 {name}:1400")
    assert story.dispatch() == ["a", "c"]
    # b would wait 3800 and compute 1400 on w0; 3800 on w1: 5200 < 1.5 * 3800.
    # c would wait 5200 and compute 1400: 6600 > 1.5 * 3800.
    assert story.worker_of("a") == "w0"
    assert seen(story.placed["c"]) == ("w1", "rebalance", {"w0": 5200 + 1400, "w1": 3800})
    assert story.first_token("a") == ["b"]
    assert story.first_token("c") == ["d"]
    assert seen(story.placed["b"]) == ("w0", "exploit", {"w0": 3800 + 1400})
    assert seen(story.placed["d"]) == ("w1", "exploit", {"w0": 5200 + 1400, "w1": 3800 + 1400})


def test_nothing_is_moved_to_a_worker_that_has_as_much_load_of_late() -> None:
    story = e2()
    story.call("a", "header:2400 a:1400")
    story.run("other", "other:5000")
    for name in "bcd":
        story.submit(name, f"header:2400 {name}:1400")
    story.dispatch()
    story.first_token("a")
    # c would wait 5200 and compute 1400, against 3800 on w1; but L0 = 5200, L1 = 5000.
    assert [story.worker_of(name) for name in "bcd"] == ["w0", "w0", "w0"]


def test_equal_costs_go_to_the_fewest_unfinished_requests_and_then_to_the_first_id() -> None:
    story = e2(3, profile=FREE)
    assert [story.call(name, f"{name}:10").worker_id for name in "abc"] == ["w0", "w1", "w2"]
    story.finish("b")
    assert [story.call(name, f"{name}:10").worker_id for name in "de"] == ["w1", "w0"]


def test_a_burst_of_short_questions_stays_with_its_document() -> None:
    story = e2()
    for number in range(30):
        story.submit(f"q{number}", f"document:1000 question{number}:10")
    story.dispatch()
    story.first_token("q0")
    assert {(p.worker_id, p.reason) for name, p in story.placed.items() if name != "q0"} == {
        ("w0", "exploit")
    }


def test_when_nothing_waits_a_heavy_worker_keeps_its_requests() -> None:
    story = e2()
    for number in range(50):
        assert story.run(f"q{number}", f"document:1000 question{number}:100").worker_id == "w0"


def queueing_doubled(workers: int = 2, policy: PrebleE2 | None = None) -> Story:
    """A document whose requests waited 1 s each in the older half of the window and 3 s in the newer."""
    story = e2(workers, profile=MILLISECOND_PER_TOKEN, window_s=40.0, policy=policy)
    for number in range(8):
        placement = story.call(f"q{number}", f"document:1000 question{number}:10")
        assert placement.worker_id == "w0"
        story.now += 1.0 if number < 4 else 3.0
        story.finish(f"q{number}")
        story.now = max(story.now, 20.0 if number >= 3 else 0.0)
    return story


def test_a_prefix_whose_queueing_time_doubled_is_copied_to_another_worker() -> None:
    story = queueing_doubled()
    placement = story.call("next", "document:1000 next:10")
    assert (placement.worker_id, placement.reason, placement.matched_len) == ("w1", "replicate", 0)


def test_a_copied_prefix_is_not_copied_on_while_the_copy_is_fresh() -> None:
    story = queueing_doubled(workers=3)
    story.call("copy", "document:1000 copy:10")
    story.finish("copy")
    assert story.worker_of("copy") == "w1"
    assert story.call("next", "document:1000 next:10").worker_id in {"w0", "w1"}


def test_a_doubling_below_the_cost_of_recomputing_copies_nothing() -> None:
    story = e2(profile=MILLISECOND_PER_TOKEN, window_s=40.0)
    story.run("first", "document:1000 first:10")
    for number in range(8):
        story.call(f"q{number}", f"document:1000 question{number}:10")
        story.now += 0.1 if number < 4 else 0.3
        story.finish(f"q{number}")
        story.now = max(story.now, 20.0 if number >= 3 else 0.0)
    assert story.call("next", "document:1000 next:10").worker_id == "w0"


# The switches of an ablation: each story above, with its mechanism left out


def test_without_balance_an_explored_prefill_goes_where_the_load_is_least() -> None:
    story = decode_heavy(hits=18, policy=PrebleE2(balance=False))
    assert seen(story.call("new", "new:100")) == ("w1", "explore", {"w0": 328, "w1": 320})


def test_without_rebalance_a_header_stays_where_it_is() -> None:
    story = e2(policy=PrebleE2(rebalance=False))
    for name in "abcd":
        story.submit(name, f"header:2400 {name}:1400")
    story.dispatch()
    story.first_token("a")
    assert {(p.worker_id, p.reason) for name, p in story.placed.items() if name != "a"} == {("w0", "exploit")}


def test_without_replicate_a_prefix_whose_queueing_time_doubled_is_not_copied() -> None:
    story = queueing_doubled(policy=PrebleE2(replicate=False))
    assert story.call("next", "document:1000 next:10").reason == "exploit"
