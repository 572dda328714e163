"""What a runtime tells of its cache, as stories: after each batch the tree has what the runtime has."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from preble_sgl.core import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    WorkerId,
    block_hashes,
    token_ids,
)
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched import FeedResult, FeedSnapshot, GlobalScheduler
from tests.global_sched.fake_cache import hashes
from tests.global_sched.stories import Story, prompt

W0, W1 = WorkerId("w0"), WorkerId("w1")


def stored(text: str, behind: str = "", *, page_size: int = 1, namespace: str = "") -> BlocksStored:
    """The pages of `behind` and `text` together that are not pages of `behind`."""
    ids = prompt(f"{behind} {text}".strip())
    pages = hashes(ids, page_size, namespace)
    num_behind = len(prompt(behind)) // page_size if behind else 0
    return BlocksStored(
        block_hashes=block_hashes(pages[num_behind:]),
        parent_hash=pages[num_behind - 1] if num_behind else None,
        token_ids=ids[num_behind * page_size : len(pages) * page_size],
        block_size=page_size,
        namespace=namespace,
    )


def removed(text: str, start: int, end: int | None = None, *, page_size: int = 1) -> BlocksRemoved:
    """Some of the pages of a prompt."""
    return BlocksRemoved(block_hashes(hashes(prompt(text), page_size)[start:end]))


class FeedStory(Story):
    """A story whose workers tell of their caches. `tell` numbers the batches; the first one clears."""

    def __init__(
        self, *live: str, page_size: int = 1, kv_tokens: int = 1000, window_s: float = 180.0
    ) -> None:
        super().__init__(workers=live or ["w0"], page_size=page_size, kv_tokens=kv_tokens, window_s=window_s)
        self.next_seq = dict.fromkeys(live or ["w0"], 0)
        for worker in self.next_seq:
            self.tell(CacheCleared(), worker=worker)

    def tell(self, *events: CacheEvent, worker: str = "w0") -> FeedResult:
        seq = self.next_seq[worker]
        self.next_seq[worker] += 1
        return self.tell_batch(seq, *events, worker=worker)

    def tell_batch(self, seq: int, *events: CacheEvent, worker: str = "w0") -> FeedResult:
        result = self.scheduler.on_cache_events(WorkerId(worker), seq, events, self.now)
        self.scheduler.check_invariants()
        return result

    def feed(self, worker: str = "w0") -> FeedSnapshot:
        return self.scheduler.snapshot().cache_feeds[WorkerId(worker)]

    def used(self, worker: str = "w0") -> int:
        [snapshot] = [w for w in self.scheduler.snapshot().workers if w.worker_id == worker]
        return snapshot.used_tokens

    def len_on(self, text: str, worker: str = "w0", *, namespace: str = "") -> int:
        match = self.scheduler._tree.match(namespace, prompt(text).tobytes())
        return match.len_on(WorkerId(worker))


# Stored and removed


def test_what_a_runtime_stored_is_there_though_no_request_of_ours_put_it_there() -> None:
    story = FeedStory()
    assert story.tell(stored("document:100")) == FeedResult("applied", 2)
    assert story.call("a", "document:100 a:10").matched_len == 100
    assert story.feed().stored_tokens == 100


def test_a_removal_cuts_a_node_where_the_runtimes_own_node_began() -> None:
    story = FeedStory()
    story.tell(stored("document:100"))
    story.tell(removed("document:100", 70))
    assert story.len_on("document:100") == story.used() == story.feed().stored_tokens == 70
    assert story.scheduler.snapshot().num_nodes == 1


def test_a_removal_spans_nodes_and_lists_each_from_its_top() -> None:
    story = FeedStory()
    story.tell(stored("document:100"))
    story.tell(stored("a:10", "document:100"), stored("b:10", "document:100"))
    both_leaves_first = [*removed("document:100 a:10", 100).block_hashes]
    both_leaves_first += removed("document:100 b:10", 100).block_hashes
    rest_of_document = removed("document:100", 40).block_hashes
    story.tell(BlocksRemoved(block_hashes([*both_leaves_first, *rest_of_document])))
    assert (story.len_on("document:100"), story.used()) == (40, 40)
    assert story.feed().counts == {"started": 1, "applied": 3}


def test_the_same_pages_are_stored_removed_and_stored_again_in_one_batch() -> None:
    story = FeedStory()
    document = stored("document:50")
    story.tell(document, document, removed("document:50", 0), document)
    assert story.used() == story.feed().stored_tokens == 50


def test_a_cleared_cache_is_empty() -> None:
    story = FeedStory()
    story.tell(stored("document:50"), CacheCleared(), stored("other:20"))
    assert (story.len_on("document:50"), story.len_on("other:20"), story.used()) == (0, 20, 20)


def test_namespaces_are_told_apart() -> None:
    story = FeedStory()
    story.tell(stored("document:50", namespace="alice"))
    assert (story.len_on("document:50"), story.len_on("document:50", namespace="alice")) == (0, 50)
    story.tell(stored("a:5", "document:50", namespace="alice"))
    assert story.len_on("document:50 a:5", namespace="alice") == 55
    nameless = replace(stored("b:5", "document:50", namespace="alice"), namespace="")
    story.tell(nameless)
    assert story.len_on("document:50 b:5", namespace="alice") == 55, "a page says where it belongs"


def test_each_worker_has_its_own_pages_on_the_same_nodes() -> None:
    story = FeedStory("w0", "w1")
    for worker in ("w0", "w1"):
        story.tell(stored("document:100"), worker=worker)
    story.tell(removed("document:100", 30), worker="w0")
    story.tell(stored("a:10", "document:100"), worker="w1")
    assert (story.len_on("document:100 a:10", "w0"), story.len_on("document:100 a:10", "w1")) == (30, 110)


def test_beyond_the_capacity_nothing_is_evicted_before_the_runtime_says_so() -> None:
    story = FeedStory(kv_tokens=100)
    story.tell(stored("a:60"))
    story.call("b", "b:60")
    assert (story.used(), story.len_on("a:60")) == (120, 60)
    story.tell(removed("a:60", 20), stored("b:60"))
    assert (story.used(), story.len_on("a:60")) == (80, 20)


# Pages of more than one token


def test_a_page_is_cut_by_others_and_still_goes_whole() -> None:
    story = FeedStory("w0", page_size=4)
    story.up("w1")
    story.tell(stored("x:6 a:2", page_size=4), stored("b:2", "x:6", page_size=4))
    assert (story.len_on("x:6 a:2"), story.len_on("x:6 b:2"), story.feed().stored_tokens) == (8, 8, 12)
    story.tell(removed("x:6 a:2", 1, page_size=4))
    assert (story.len_on("x:6 a:2"), story.len_on("x:6 b:2")) == (4, 8)
    story.tell(removed("x:6 b:2", 1, page_size=4))
    assert (story.len_on("x:6 b:2"), story.used()) == (4, 4), "not the two tokens of a page that is gone"


def test_a_prompt_of_our_own_may_part_from_a_told_one_inside_a_page() -> None:
    story = FeedStory(page_size=4)
    story.tell(stored("x:6 a:10", page_size=4))
    story.call("b", "x:6 b:10")
    assert story.placed["b"].matched_len == 4
    story.tell(stored("b:10", "x:6", page_size=4), removed("x:6 a:10", 1, page_size=4))
    assert (story.len_on("x:6 a:10"), story.len_on("x:6 b:10")) == (4, 16)


# What we believe before the runtime tells


def test_a_finished_request_is_believed_until_the_runtime_tells_and_then_known() -> None:
    story = FeedStory()
    story.run("a", "a:50", output="answer:11")
    assert (story.len_on("a:50 answer:10"), story.feed().stored_tokens) == (60, 0)
    story.tell(stored("a:50 answer:10"))
    assert (story.len_on("a:50 answer:10"), story.feed().stored_tokens) == (60, 60)
    assert "refuted_tokens" not in story.feed().counts


def test_what_the_next_batch_does_not_tell_of_a_finished_request_is_dropped() -> None:
    story = FeedStory()
    story.run("a", "a:50", output="answer:11")
    story.tell(stored("a:50"))
    assert (story.len_on("a:50 answer:10"), story.used()) == (50, 50)
    assert story.feed().counts["refuted_tokens"] == 10


def test_what_was_dropped_too_early_comes_back_with_its_event() -> None:
    story = FeedStory()
    story.run("a", "a:50")
    story.tell(stored("other:5"))
    assert story.len_on("a:50") == 0
    story.tell(stored("a:50"))
    assert story.len_on("a:50") == 50


def test_a_running_request_keeps_what_it_uses_and_is_doubted_at_its_end() -> None:
    story = FeedStory()
    story.call("a", "a:50")
    story.first_token("a")
    story.tell(stored("other:5"))
    assert story.len_on("a:50") == 50
    story.finish("a")
    story.tell(removed("other:5", 0))
    assert story.used() == 0


def test_a_prompt_is_known_as_far_as_its_chunks_are_told() -> None:
    story = FeedStory()
    story.call("a", "a:50 b:50")
    story.tell(stored("a:50"))
    story.submit("c", "a:50 c:50")
    assert story.dispatch() == ["c"], "it waits for nobody: what it shares is computed"
    assert story.placed["c"].matched_len == 50
    story.cancel("a")
    assert (story.len_on("a:50 b:50"), story.used()) == (50, 100)


def test_a_removal_of_what_a_waiting_request_was_promised_is_counted_and_harmless() -> None:
    story = FeedStory()
    story.tell(stored("document:100"))
    story.call("a", "document:100 a:10")
    story.tell(removed("document:100", 0))
    assert story.feed().counts["in_use_blocks"] == 100
    story.first_token("a")
    story.finish("a", output="answer:5", cached=0)
    story.tell(stored("document:100 a:10 answer:4"))
    assert story.used() == story.feed().stored_tokens == 114


def test_a_request_that_never_ran_leaves_what_was_removed_under_it_to_the_next_batch() -> None:
    story = FeedStory()
    story.tell(stored("document:100"))
    story.call("a", "document:100 a:10")
    story.tell(removed("document:100", 30))
    story.cancel("a")
    assert story.used() == 100
    story.tell(stored("other:5"))
    assert (story.len_on("document:100"), story.used()) == (30, 35)


def test_a_runtime_that_tells_nothing_is_believed_to_have_no_more_than_it_can_hold() -> None:
    story = FeedStory(kv_tokens=100, window_s=1.0)
    for number in range(50):
        story.now = float(10 * number)
        story.run(f"r{number}", f"text{number}:30")
    assert story.used() <= 100
    assert story.scheduler.snapshot().num_nodes <= 4


def test_nodes_that_the_runtime_removed_and_nobody_lately_used_are_deleted() -> None:
    story = FeedStory(window_s=10.0)
    for number in range(200):
        story.now = float(number)
        story.run(f"r{number}", f"text{number}:30")
        story.tell(stored(f"text{number}:30"), removed(f"text{number - 1}:30", 0))
    assert story.scheduler.snapshot().num_nodes <= 11
    story.now = 1000.0
    story.tell(removed("text199:30", 0))
    assert (story.scheduler.snapshot().num_nodes, story.used()) == (0, 0)


# The numbers of batches


def test_after_a_gap_nothing_is_applied_until_the_missing_batches_are_replayed() -> None:
    story = FeedStory()
    assert story.tell_batch(2, stored("b:10")) == FeedResult("gap", 1)
    assert story.used() == 0
    assert story.tell_batch(1, stored("a:10")) == FeedResult("applied", 2)
    assert story.tell_batch(2, stored("b:10")) == FeedResult("applied", 3)
    assert story.used() == 20


def test_a_worker_whose_feed_is_lost_is_estimated_again() -> None:
    story = FeedStory(kv_tokens=100)
    story.tell(stored("a:60"), stored("b:60"))
    story.scheduler.on_cache_feed_lost(W0, story.now)
    story.scheduler.check_invariants()
    assert (story.len_on("a:60"), story.len_on("b:60")) == (0, 60), "the least recently used is evicted"
    assert story.tell_batch(5, stored("c:10")) == FeedResult("gap", 0)
    assert not story.feed().is_live
    story.scheduler.on_cache_feed_lost(W0, story.now)  # a feed that is lost already: nothing to do


def test_a_batch_that_clears_the_cache_needs_none_before_it() -> None:
    story = FeedStory()
    story.tell(stored("a:60"))
    story.scheduler.on_cache_feed_lost(W0, story.now)
    batch: list[CacheEvent] = [stored("x:5", "unknown:5"), CacheCleared(), stored("b:10")]
    assert story.tell_batch(70, *batch) == FeedResult("started", 71)
    assert (story.used(), story.feed().is_live) == (10, True)
    assert "orphan_blocks" not in story.feed().counts


def test_an_old_batch_changes_nothing() -> None:
    story = FeedStory()
    story.tell(stored("a:10"))
    story.tell(removed("a:10", 0))
    assert story.tell_batch(1, stored("a:10")) == FeedResult("old", 3)
    assert story.used() == 0


def test_batch_0_comes_from_a_restarted_runtime_which_has_nothing() -> None:
    story = FeedStory()
    story.tell(stored("a:10"))
    story.run("b", "b:10")
    assert story.tell_batch(0, CacheCleared()) == FeedResult("started", 1)
    assert story.used() == 0
    assert story.tell_batch(1, stored("c:10")) == FeedResult("applied", 2)


def test_what_was_estimated_before_the_first_batch_is_forgotten_except_what_is_in_use() -> None:
    story = Story(workers=["w0"])
    story.run("a", "a:10")
    story.call("b", "b:10")
    story.first_token("b")
    story.call("c", "c:10")
    story.scheduler.on_cache_events(W0, 0, [CacheCleared()], story.now)
    story.scheduler.check_invariants()
    assert story.scheduler.snapshot().workers[0].used_tokens == 20
    story.finish("b")
    story.finish("c")
    story.scheduler.on_cache_events(W0, 1, [], story.now)
    assert story.scheduler.snapshot().workers[0].used_tokens == 0


def test_the_answer_to_a_flush_is_left_to_the_runtime_which_tells_in_order() -> None:
    story = FeedStory()
    story.tell(stored("a:10"))
    story.tell(CacheCleared(), stored("b:10"))
    story.scheduler.on_cache_cleared(W0, story.now)
    assert story.used() == 10


# What cannot be placed


def test_the_removal_of_unknown_pages_is_counted() -> None:
    story = FeedStory()
    story.tell(stored("a:10"))
    story.tell(removed("never:7", 0))
    assert (story.used(), story.feed().counts["unknown_blocks"]) == (10, 7)


def test_the_removal_of_pages_with_others_behind_them_is_counted_and_not_believed() -> None:
    story = FeedStory()
    story.tell(stored("a:10"), stored("b:10", "a:10"))
    story.tell(removed("a:10", 3, 6), removed("a:10", 8))
    assert (story.len_on("a:10 b:10"), story.feed().counts["unknown_blocks"]) == (20, 5)


def test_pages_behind_an_unknown_page_are_counted_and_left_out() -> None:
    story = FeedStory()
    story.tell(stored("b:10", "never:7"))
    assert (story.used(), story.feed().counts["orphan_blocks"]) == (0, 10)


def test_a_page_inside_a_node_is_searched_for_once() -> None:
    story = FeedStory()
    story.tell(stored("document:100"))
    story.tell(stored("a:10", "document:40"), stored("b:10", "document:40"))
    assert story.feed().counts["searches"] == 1
    assert (story.len_on("document:40 a:10"), story.len_on("document:100")) == (50, 100)


Call = Callable[[GlobalScheduler], object]
REFUSED: dict[str, tuple[type[Exception], Call]] = {
    "an unknown worker": (UnknownIdError, lambda s: s.on_cache_events(WorkerId("w9"), 0, [], 5.0)),
    "a lost unknown worker": (UnknownIdError, lambda s: s.on_cache_feed_lost(WorkerId("w9"), 5.0)),
    "a batch below 0": (InputError, lambda s: s.on_cache_events(W0, -1, [], 5.0)),
    "time running backwards": (InputError, lambda s: s.on_cache_events(W0, 1, [CacheCleared()], 4.0)),
    "pages of another size": (
        InputError,
        lambda s: s.on_cache_events(W0, 1, [CacheCleared(), stored("a:8", page_size=4)], 5.0),
    ),
}


@pytest.mark.parametrize(("error", "call"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(error: type[Exception], call: Call) -> None:
    story = FeedStory()
    story.now = 5.0
    story.tell(stored("document:10"))
    before = story.scheduler.snapshot()
    with pytest.raises(error):
        call(story.scheduler)
    assert story.scheduler.snapshot() == before


def test_pages_and_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks of 4 tokens cannot hold 7 tokens"):
        BlocksStored(
            block_hashes=block_hashes([1, 2]), parent_hash=None, token_ids=token_ids(range(7)), block_size=4
        )
