"""The life of requests and workers, as stories; what is wrong is refused and changes nothing."""

import random
from collections.abc import Callable

import pytest

from preble_sgl.core import RequestId, WorkerId, token_ids
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched import GlobalScheduler, make_policy
from tests.global_sched.stories import FREE_DECODE, ONE_SECOND_PER_TOKEN, Story, request

W0, W1 = WorkerId("w0"), WorkerId("w1")


def test_a_placement_names_worker_match_reason_and_costs() -> None:
    story = Story("least_load")
    placement = story.call("a", "document:100 a:10")
    assert (placement.worker_id, placement.matched_len, placement.reason) == ("w0", 0, "least_load")
    assert placement.costs == {"w0": 0.0, "w1": 0.0}


def test_requests_wait_while_there_is_no_worker() -> None:
    story = Story(workers=[])
    for name in "ab":
        story.submit(name, f"{name}:10")
    assert story.dispatch() == []
    assert story.scheduler.num_queued == 2
    story.up("w0")
    assert story.dispatch() == ["a", "b"]
    assert story.placed["a"].reason == "only_worker"
    assert story.scheduler.num_running == 2


def test_a_request_is_dispatched_once() -> None:
    story = Story()
    story.call("a", "a:10")
    assert story.dispatch() == []


def test_prompt_and_output_are_cached_except_the_last_token_which_has_no_kv() -> None:
    story = Story(workers=["w0"])
    story.run("a", "question:50", output="answer:20")
    assert story.call("b", "question:50 answer:20 more:10").matched_len == 69


@pytest.mark.parametrize("output", ["", "one:1"])
def test_an_output_of_no_or_one_token_adds_nothing_to_the_cache(output: str) -> None:
    story = Story(workers=["w0"])
    story.run("a", "question:50", output=output)
    assert story.call("b", "question:50 one:1 more:10").matched_len == 50


def test_only_whole_pages_are_matched() -> None:
    story = Story(workers=["w0"], page_size=16)
    story.run("a", "question:50", output="answer:20")
    assert story.call("b", "question:50 answer:20 more:10").matched_len == 64
    assert story.call("c", "question:50").matched_len == 48
    assert story.call("d", "question:48").matched_len == 32, "the last token is computed, so its page is"


def test_a_prompt_below_one_page_survives_a_flush_and_caches_what_it_grows_to() -> None:
    story = Story(workers=["w0"], page_size=16)
    story.call("a", "question:10")
    story.scheduler.on_cache_cleared(W0, story.now)
    story.finish("a", output="answer:23")
    assert story.call("b", "question:10 answer:23 more:10").matched_len == 32


def test_a_worker_holds_no_more_than_its_cache() -> None:
    story = Story(workers=["w0"], kv_tokens=250)
    for name in "abc":
        story.run(name, f"{name}:100")
    assert story.scheduler.snapshot().workers[0].used_tokens == 200
    assert story.call("again", "a:100").matched_len == 0
    assert story.call("still", "c:100").matched_len == 99


def test_when_a_worker_dies_its_requests_are_placed_again_before_later_ones() -> None:
    story = Story("round_robin")
    for name in "abcd":
        story.submit(name, f"{name}:10")
    assert story.dispatch() == ["a", "b", "c", "d"]
    story.submit("e", "e:10")
    story.finish("a")
    assert story.worker_of("e") == "w0"
    story.submit("f", "f:10")
    assert story.scheduler.on_worker_down(W0, story.now) == ["c", "e"]
    story.scheduler.check_invariants()
    assert story.dispatch() == ["c", "e", "f"]
    assert {story.worker_of(name) for name in "cef"} == {"w1"}
    for name in "bcdef":
        story.finish(name)
    assert story.scheduler.num_running == story.scheduler.num_queued == 0


def test_the_last_worker_may_die_and_come_back_empty() -> None:
    story = Story(workers=["w0"])
    story.run("a", "document:100")
    story.call("b", "document:100 b:10")
    story.scheduler.on_worker_down(W0, story.now)
    assert story.dispatch() == []
    story.up("w0")
    assert story.dispatch() == ["b"]
    assert story.placed["b"].matched_len == 0


def test_a_draining_worker_finishes_its_own_and_gets_nothing_new() -> None:
    story = Story("round_robin")
    story.call("a", "a:10")
    story.scheduler.on_worker_drain(W0, story.now)
    assert [story.call(name, f"{name}:10").worker_id for name in "bcd"] == ["w1"] * 3
    story.finish("a", output="answer:5")
    assert story.scheduler.on_worker_down(W0, story.now) == []


def test_the_cache_of_a_draining_worker_attracts_nobody() -> None:
    story = Story("preble_e2")
    story.run("a", "document:1000 a:10")
    story.scheduler.on_worker_drain(W0, story.now)
    assert story.call("b", "document:1000 b:10").worker_id == "w1"


def test_a_cancelled_request_leaves_the_queue() -> None:
    story = Story(workers=[])
    story.submit("a", "a:10")
    story.cancel("a")
    story.up("w0")
    assert story.dispatch() == []


def test_a_request_cancelled_before_its_first_token_leaves_no_load_and_no_prefix() -> None:
    story = Story("least_load", profile=ONE_SECOND_PER_TOKEN)
    before = story.scheduler.snapshot().workers
    story.call("a", "document:100")
    story.cancel("a")
    assert story.scheduler.snapshot().workers == before
    assert story.call("b", "document:100").matched_len == 0


def test_a_flush_empties_the_cache_in_the_books_too() -> None:
    story = Story(workers=["w0"])
    story.run("a", "document:100")
    story.scheduler.on_cache_cleared(W0, story.now)
    story.scheduler.check_invariants()
    assert story.call("b", "document:100 b:10").matched_len == 0


def test_requests_running_during_a_flush_finish_as_usual() -> None:
    story = Story(workers=["w0"])
    story.call("a", "document:100 a:10")
    story.call("b", "other:100")
    story.first_token("a")
    story.scheduler.on_cache_cleared(W0, story.now)
    story.finish("a", output="answer:10")
    story.finish("b")
    assert story.call("c", "document:100 a:10 answer:10").matched_len == 119


def test_load_rises_with_a_placement_and_falls_with_the_first_token_and_the_end() -> None:
    story = Story(workers=["w0"], profile=ONE_SECOND_PER_TOKEN)
    story.run("seen", "seen:5", output="answer:7")
    story.call("a", "a:100")
    [worker] = story.scheduler.snapshot().workers
    assert (worker.num_prefill, worker.pending_prefill_tokens, worker.outstanding_s) == (1, 100, 107.0)
    story.first_token("a")
    [worker] = story.scheduler.snapshot().workers
    assert (worker.num_prefill, worker.num_decode, worker.outstanding_s) == (0, 1, 7.0)
    story.finish("a", output="answer:7")
    [worker] = story.scheduler.snapshot().workers
    assert (worker.num_decode, worker.outstanding_s, worker.recent_s) == (0, 0.0, 5 + 100 + 2 * 7.0)


def test_an_output_length_is_assumed_until_one_is_seen() -> None:
    story = Story(workers=["w0"], profile=ONE_SECOND_PER_TOKEN)
    story.call("a", "a:100")
    assert story.scheduler.snapshot().workers[0].outstanding_s == 100 + 45


def test_recent_load_is_forgotten_after_the_window() -> None:
    story = Story(workers=["w0"], window_s=10.0)
    story.run("a", "a:100")
    story.now = 10.0
    story.dispatch()
    assert story.scheduler.snapshot().workers[0].recent_s == 100.0
    story.now = 10.5
    story.dispatch()
    assert story.scheduler.snapshot().workers[0].recent_s == 0.0


def test_an_unfinished_request_is_load_however_old() -> None:
    story = Story(workers=["w0"], window_s=10.0)
    story.call("a", "a:100")
    story.now = 1000.0
    story.dispatch()
    assert story.scheduler.snapshot().workers[0].recent_s == 100.0
    story.finish("a", output="answer:5")
    assert story.scheduler.snapshot().workers[0].recent_s == 0.0


def test_what_the_runtime_found_cached_corrects_what_was_expected() -> None:
    story = Story(workers=["w0"])
    story.run("a", "document:100")
    story.call("b", "document:100 b:10")
    assert story.scheduler.snapshot().workers[0].recent_s == 100 + 10
    story.finish("b", cached=40)
    [worker] = story.scheduler.snapshot().workers
    assert worker.recent_s == 100 + 70
    assert (worker.num_finished, worker.prompt_tokens, worker.cached_tokens) == (2, 210, 40)


def test_nodes_that_nobody_holds_or_lately_used_are_deleted() -> None:
    story = Story(workers=["w0"], kv_tokens=1000, window_s=10.0)
    for number in range(200):
        story.now = float(number)
        story.run(f"r{number}", f"text{number}:100")
    assert story.scheduler.snapshot().num_nodes <= 10 + 11


def test_placements_are_counted_by_reason() -> None:
    story = Story("preble_e2")
    story.run("a", "document:100 a:10")
    story.run("b", "document:100 b:10")
    assert story.scheduler.snapshot().num_placements == {"explore": 1, "exploit": 1}


# What is refused


Call = Callable[[GlobalScheduler], object]

REFUSED: dict[str, tuple[type[Exception], Call]] = {
    "time running backwards": (InputError, lambda s: s.dispatch(4.9)),
    "time that is no number": (InputError, lambda s: s.dispatch(float("nan"))),
    "a request submitted twice": (InputError, lambda s: s.submit(request("sent", "x:5"), 5.0)),
    "a worker up twice": (
        InputError,
        lambda s: s.on_worker_up(W0, kv_tokens=10, page_size=1, profile=FREE_DECODE, now=5.0),
    ),
    "a worker without a cache": (
        InputError,
        lambda s: s.on_worker_up(WorkerId("w9"), kv_tokens=0, page_size=1, profile=FREE_DECODE, now=5.0),
    ),
    "a worker up in the past": (
        InputError,
        lambda s: s.on_worker_up(WorkerId("w9"), kv_tokens=10, page_size=1, profile=FREE_DECODE, now=1.0),
    ),
    "an unknown worker draining": (UnknownIdError, lambda s: s.on_worker_drain(WorkerId("w9"), 5.0)),
    "an unknown worker down": (UnknownIdError, lambda s: s.on_worker_down(WorkerId("w9"), 5.0)),
    "an unknown worker flushed": (UnknownIdError, lambda s: s.on_cache_cleared(WorkerId("w9"), 5.0)),
    "an unknown request's token": (UnknownIdError, lambda s: s.on_first_token(RequestId("no"), 5.0)),
    "an unknown request cancelled": (UnknownIdError, lambda s: s.on_cancel(RequestId("no"), 5.0)),
    "an unknown request finished": (
        UnknownIdError,
        lambda s: s.on_finish(RequestId("no"), output=token_ids(), cached_tokens=0, now=5.0),
    ),
    "a held request's token": (InputError, lambda s: s.on_first_token(RequestId("held"), 5.0)),
    "a queued request's token": (InputError, lambda s: s.on_first_token(RequestId("queued"), 5.0)),
    "a second first token": (InputError, lambda s: s.on_first_token(RequestId("decoding"), 5.0)),
    "a first token in the past": (InputError, lambda s: s.on_first_token(RequestId("sent"), 4.0)),
    "an end in the past": (
        InputError,
        lambda s: s.on_finish(RequestId("sent"), output=token_ids(), cached_tokens=0, now=4.0),
    ),
    "more cached than the prompt has": (
        InputError,
        lambda s: s.on_finish(RequestId("sent"), output=token_ids(), cached_tokens=111, now=5.0),
    ),
    "fewer than no cached tokens": (
        InputError,
        lambda s: s.on_finish(RequestId("sent"), output=token_ids(), cached_tokens=-1, now=5.0),
    ),
}


@pytest.mark.parametrize(("error", "call"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(error: type[Exception], call: Call) -> None:
    story = Story(workers=["w0"])
    story.call("decoding", "other:50")
    story.first_token("decoding")
    story.submit("sent", "document:100 a:10")
    story.submit("held", "document:100 b:10")
    story.now = 5.0
    assert story.dispatch() == ["sent"]
    story.submit("queued", "x:50")
    before = story.scheduler.snapshot()
    with pytest.raises(error):
        call(story.scheduler)
    assert story.scheduler.snapshot() == before
    story.scheduler.check_invariants()
    assert story.dispatch() == ["queued"]
    assert story.first_token("sent") == ["held"]


def test_a_finished_request_is_unknown() -> None:
    story = Story()
    story.run("a", "a:10")
    with pytest.raises(UnknownIdError):
        story.finish("a")


def test_a_window_of_no_length_is_refused() -> None:
    with pytest.raises(InputError):
        GlobalScheduler(make_policy("round_robin"), rng=random.Random(0), window_s=0.0)
