"""Requests that share a pending prefix wait for the request that computes it, and for nothing else."""

from preble_sgl.core import RequestId, WorkerId
from tests.global_sched.stories import Story, prompt, request


def one_worker(*, prefix_first: bool = True) -> Story:
    return Story(workers=["w0"], prefix_first=prefix_first)


def test_siblings_that_arrive_together_wait_for_the_first_of_them() -> None:
    story = one_worker()
    for name in "abc":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a"]
    assert story.first_token("a") == ["b", "c"]
    assert [story.placed[name].matched_len for name in "abc"] == [0, 100, 100]


def test_without_prefix_first_siblings_start_at_once_and_are_not_promised_the_prefix() -> None:
    story = one_worker(prefix_first=False)
    for name in "ab":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a", "b"]
    assert story.placed["b"].matched_len == 0


def test_31_pending_tokens_are_not_worth_waiting_for_and_32_are() -> None:
    short, long = one_worker(), one_worker()
    for name in "ab":
        short.submit(name, f"document:31 {name}:10")
        long.submit(name, f"document:32 {name}:10")
    assert short.dispatch() == ["a", "b"]
    assert long.dispatch() == ["a"]


def test_a_prefix_that_is_cached_already_makes_nobody_wait() -> None:
    story = one_worker()
    story.run("first", "document:100 question:10")
    for name in "ab":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a", "b"]


def test_a_prefix_pending_on_another_worker_makes_nobody_wait() -> None:
    story = Story("round_robin")
    for name in "ab":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a", "b"]
    assert (story.worker_of("a"), story.worker_of("b")) == ("w0", "w1")


def test_followers_start_in_the_order_in_which_they_came() -> None:
    story = one_worker()
    for name in ["a", "d", "c", "b"]:
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a"]
    assert story.first_token("a") == ["d", "c", "b"]


def test_in_a_chain_each_follower_waits_only_for_what_it_shares() -> None:
    story = one_worker()
    story.submit("a", "system:100 a:50")
    story.submit("b", "system:100 tool:100 b:50")
    story.submit("c", "system:100 tool:100 c:50")
    story.submit("d", "system:100 d:50")
    assert story.dispatch() == ["a"]
    assert story.first_token("a") == ["b", "d"], "c waits on: b is going to compute the tool"
    assert story.first_token("b") == ["c"]
    assert [story.placed[name].matched_len for name in "abcd"] == [0, 100, 200, 100]


def test_a_follower_that_extends_its_leader_gets_all_of_it() -> None:
    story = one_worker()
    story.submit("turn1", "system:40 user1:40")
    story.submit("turn2", "system:40 user1:40 answer1:40 user2:40")
    story.submit("turn3", "system:40 user1:40 answer1:40 user2:40 answer2:40")
    assert story.dispatch() == ["turn1"]
    assert story.first_token("turn1") == ["turn2"]
    assert story.first_token("turn2") == ["turn3"]
    assert story.placed["turn3"].matched_len == 160


def test_a_short_pending_remainder_does_not_keep_a_follower() -> None:
    story = one_worker()
    story.submit("a", "system:100 a:50")
    story.submit("b", "system:100 few:20 b:50")
    story.submit("c", "system:100 few:20 c:50")
    assert story.dispatch() == ["a"]
    assert story.first_token("a") == ["b", "c"]
    assert story.placed["c"].matched_len == 100, "the 20 tokens are not there when c starts"


def test_the_end_of_a_leader_frees_its_followers_like_its_first_token() -> None:
    story = one_worker()
    for name in "ab":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a"]
    assert story.finish("a") == ["b"]
    assert story.placed["b"].matched_len == 100


def test_when_a_leader_is_cancelled_the_next_one_leads() -> None:
    story = one_worker()
    for name in "abc":
        story.submit(name, f"document:100 {name}:10")
    assert story.dispatch() == ["a"]
    assert story.cancel("a") == ["b"]
    assert story.placed["b"].matched_len == 0
    assert story.first_token("b") == ["c"]
    assert story.placed["c"].matched_len == 100


def test_a_leader_cancelled_after_its_first_token_has_left_its_prefix() -> None:
    story = one_worker()
    story.call("a", "document:100 a:10")
    story.first_token("a")
    story.cancel("a")
    assert story.call("b", "document:100 b:10").matched_len == 100


def test_a_cancelled_follower_is_never_sent_and_its_own_followers_go_on() -> None:
    story = one_worker()
    story.submit("a", "system:100 a:50")
    story.submit("b", "system:100 tool:100 b:50")
    story.submit("c", "system:100 tool:100 c:50")
    assert story.dispatch() == ["a"]
    assert story.cancel("b") == []
    assert story.first_token("a") == ["c"]
    assert story.placed["c"].matched_len == 100


def test_a_follower_cancelled_between_release_and_dispatch_is_not_sent() -> None:
    story = one_worker()
    for name in "ab":
        story.submit(name, f"document:100 {name}:10")
    story.dispatch()
    story.scheduler.on_first_token(RequestId("a"), story.now)
    assert story.cancel("b") == []
    assert story.scheduler.num_held == 0


def test_identical_prompts_are_computed_once() -> None:
    story = one_worker()
    for name in "abc":
        story.submit(name, "document:100")
    assert story.dispatch() == ["a"]
    assert story.first_token("a") == ["b", "c"]
    assert story.placed["c"].matched_len == 99, "a runtime always computes the last token"


def test_when_a_worker_dies_its_leader_and_followers_go_to_another_together() -> None:
    story = Story("preble_e2")
    for name in "abc":
        story.submit(name, f"document:1000 {name}:10")
    assert story.dispatch() == ["a"]
    assert story.worker_of("a") == "w0"
    assert story.scheduler.on_worker_down(WorkerId("w0"), story.now) == ["a"]
    story.scheduler.check_invariants()
    assert story.dispatch() == ["a"]
    assert story.worker_of("a") == "w1"
    assert story.first_token("a") == ["b", "c"]


def test_draining_a_worker_sends_its_held_requests_elsewhere() -> None:
    story = Story("preble_e2")
    for name in "ab":
        story.submit(name, f"document:1000 {name}:10")
    assert story.dispatch() == ["a"]
    story.scheduler.on_worker_drain(WorkerId("w0"), story.now)
    assert story.dispatch() == ["b"]
    assert (story.worker_of("b"), story.placed["b"].matched_len) == ("w1", 0)
    assert story.finish("a") == []


def test_a_flushed_cache_makes_the_earliest_request_lead_again() -> None:
    story = one_worker()
    story.run("first", "document:100 first:10")
    story.call("a", "document:100 a:10")
    story.submit("b", "document:100 a:10 more:50 b:10")
    assert story.dispatch() == ["b"]
    story.submit("c", "document:100 a:10 more:50 c:10")
    assert story.dispatch() == []
    story.scheduler.on_cache_cleared(WorkerId("w0"), story.now)
    story.scheduler.check_invariants()
    assert story.first_token("a") == [], "b is still going to compute the rest"
    assert story.first_token("b") == ["c"]


def test_a_request_ready_to_start_is_held_again_when_its_prefix_is_flushed() -> None:
    story = one_worker()
    story.run("first", "document:100")
    story.call("x", "document:100 x:10")
    story.call("leader", "document:100 tool:100 leader:10")
    story.submit("b", "document:100 tool:100 b:10")
    assert story.dispatch() == []
    story.scheduler.on_finish(RequestId("leader"), output=prompt(""), cached_tokens=100, now=story.now)
    story.scheduler.on_cache_cleared(WorkerId("w0"), story.now)
    story.scheduler.check_invariants()
    assert story.dispatch() == [], "x is going to compute the document again"
    assert story.first_token("x") == ["b"]
    assert story.placed["b"].matched_len == 100


def test_a_held_request_is_load_for_what_it_will_compute() -> None:
    story = one_worker()
    story.submit("a", "document:100 a:10")
    story.submit("b", "document:100 b:7")
    assert story.dispatch() == ["a"]
    assert story.scheduler.snapshot().workers[0].pending_prefill_tokens == 110 + 7


def test_other_namespaces_wait_for_nobody() -> None:
    story = one_worker()
    story.submit("a", "document:100 a:10", namespace="alice")
    story.submit("b", "document:100 b:10", namespace="bob")
    assert story.dispatch() == ["a", "b"]


def test_a_scored_prompt_reuses_only_what_lies_before_the_score() -> None:
    story = one_worker()
    story.run("first", "document:100 choice:10")
    story.scheduler.submit(request("scored", "document:100 choice:10", score_from=100), story.now)
    story.dispatch()
    assert story.placed["scored"].matched_len == 99
