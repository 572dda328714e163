"""Random lives of runtimes that tell of their caches: when all is told, the tree has what they have."""

import random
from dataclasses import dataclass, field

import pytest

from preble_sgl.core import ProgramId, Request, RequestId, WorkerId, token_ids
from preble_sgl.global_sched import FeedResult, GlobalScheduler, make_policy
from tests.global_sched.fake_cache import FakeCache
from tests.global_sched.stories import A6000_MISTRAL_7B

NAMESPACES = ["", "", "salt"]
PAGE_SIZES = {WorkerId("w0"): 1, WorkerId("w1"): 4, WorkerId("w2"): 1, WorkerId("w3"): 16}
TRUNKS = [list(range(start, start + 40)) for start in (1000, 2000)]
REPLAYED = 6
"""Batches that a runtime keeps for a replay."""


@dataclass
class Call:
    """A request inside its runtime: waiting, then with its prompt stored, then at its end."""

    request: Request
    worker_id: WorkerId
    output: list[int]
    phase: str = "waiting"
    is_started: bool = False
    locks: list[int] = field(default_factory=list)


class Life:
    """A scheduler, its runtimes, and the wires between them, which delay and lose what they carry."""

    def __init__(self, policy: str, seed: int, capacity: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = GlobalScheduler(make_policy(policy), rng=random.Random(seed), window_s=15.0)
        self.caches = {w: FakeCache(capacity, page_size) for w, page_size in PAGE_SIZES.items()}
        self.on_wire = dict.fromkeys(PAGE_SIZES, 0)
        self.cut_off: set[WorkerId] = set()
        self.calls: list[Call] = []
        self.requests: dict[RequestId, Request] = {}
        self.now = 0.0
        for worker_id in PAGE_SIZES:
            self.up(worker_id)

    def step(self) -> None:
        actions = [
            (self.submit, 8.0),
            (self.progress, 24.0),
            (self.foreign, 2.0),
            (self.cancel, 1.0),
            (self.publish, 8.0),
            (self.deliver, 10.0),
            (self.lose_batch, 0.5),
            (self.repeat_batch, 0.5),
            (self.lose_feed, 0.1),
            (self.flush, 0.2),
            (self.hear_of_a_flush, 0.1),
            (self.restart, 0.1),
            (self.down, 0.1),
        ]
        self.rng.choices([action for action, _ in actions], [weight for _, weight in actions])[0]()
        self.dispatch()
        self.now += self.rng.random() / 4

    # Requests

    def tokens(self) -> list[int]:
        trunk = self.rng.choice(TRUNKS)
        ids = trunk[: self.rng.choice([0, 1, 3, 6, 8, 17, 32, 40])]
        return ids + self.rng.choices([1, 2, 3], [8, 2, 1], k=self.rng.randint(1, 12))

    def submit(self) -> None:
        ids = self.tokens()
        if self.requests and self.rng.random() < 0.3:
            ids = [*self.rng.choice(list(self.requests.values())).prompt, *self.tokens()[-9:]]
        request = Request(
            request_id=RequestId(f"r{len(self.requests)}"),
            program_id=ProgramId("p"),
            call_path="c",
            prompt=token_ids(ids),
            namespace=self.rng.choice(NAMESPACES),
        )
        self.requests[request.request_id] = request
        self.scheduler.submit(request, self.now)

    def dispatch(self) -> None:
        for placement in self.scheduler.dispatch(self.now):
            output = self.rng.choices([1, 2, 3], k=self.rng.randint(0, 9))
            request = self.requests[placement.request_id]
            self.calls.append(Call(request, placement.worker_id, output))

    def progress(self) -> None:
        if self.calls:
            call = self.rng.choice(self.calls)
            match call.phase:
                case "waiting":
                    self.prefill(call)
                case "prefilled" if not call.is_started:
                    self.scheduler.on_first_token(call.request.request_id, self.now)
                    call.is_started = True
                case "prefilled":
                    self.end(call)
                case "ended":
                    self.report_end(call)

    def prefill(self, call: Call) -> None:
        cache, namespace = self.caches[call.worker_id], call.request.namespace
        half = call.request.prompt[: len(call.request.prompt) // 2]
        for part in (half, call.request.prompt):
            cache.store(part, namespace)
            cache.unlock(call.locks)
            call.locks = cache.lock(part, namespace)
            cache.fit()
            if self.rng.random() < 0.3:
                cache.publish()
        call.phase = "prefilled"

    def end(self, call: Call) -> None:
        """The runtime is done; the scheduler will hear of it."""
        cache = self.caches[call.worker_id]
        if self.rng.random() < 0.9:  # else it was aborted and keeps no output
            cache.store([*call.request.prompt, *call.output[:-1]], call.request.namespace)
        cache.unlock(call.locks)
        cache.fit()
        call.phase = "ended"

    def report_end(self, call: Call) -> None:
        self.scheduler.on_finish(
            call.request.request_id, output=token_ids(call.output), cached_tokens=0, now=self.now
        )
        self.calls.remove(call)

    def cancel(self) -> None:
        if self.calls:
            call = self.rng.choice(self.calls)
            if call.phase == "prefilled":
                self.end(call)
            self.calls.remove(call)
            self.scheduler.on_cancel(call.request.request_id, self.now)

    # Runtimes and wires

    def foreign(self) -> None:
        """Somebody else uses a runtime."""
        cache = self.cache()
        cache.store(self.tokens(), self.rng.choice(NAMESPACES))
        cache.evict(self.rng.randint(0, 2))

    def publish(self) -> None:
        self.cache().publish()

    def deliver(self) -> None:
        """Deliver some of what is on the wire; when a batch turns out to be missing, replay, or give up."""
        worker_id = self.worker_id()
        for _ in range(self.rng.randint(1, 4)):
            if self.on_wire[worker_id] < len(self.caches[worker_id].batches):
                seq = self.on_wire[worker_id]
                self.on_wire[worker_id] += 1
                if worker_id in self.cut_off:
                    self.replay(worker_id, 0)
                elif (result := self.tell(worker_id, seq)).status == "gap":
                    self.replay(worker_id, result.next_seq)

    def replay(self, worker_id: WorkerId, start: int) -> None:
        self.cut_off.discard(worker_id)
        end = self.on_wire[worker_id]
        if start < end - REPLAYED:
            self.scheduler.on_cache_feed_lost(worker_id, self.now)
            return
        for seq in range(start, end):
            assert self.tell(worker_id, seq).status in ("applied", "started")

    def tell(self, worker_id: WorkerId, seq: int) -> FeedResult:
        batch = self.caches[worker_id].batches[seq]
        result = self.scheduler.on_cache_events(worker_id, seq, batch, self.now)
        self.check(worker_id)
        return result

    def lose_batch(self) -> None:
        worker_id = self.worker_id()
        lost = self.rng.choice([1, 1, 1, 10])
        self.on_wire[worker_id] = min(len(self.caches[worker_id].batches), self.on_wire[worker_id] + lost)

    def repeat_batch(self) -> None:
        worker_id = self.worker_id()
        feed = self.scheduler.snapshot().cache_feeds[worker_id]
        if feed.is_live and feed.next_seq > 1 and worker_id not in self.cut_off:
            assert self.tell(worker_id, self.rng.randrange(1, feed.next_seq)).status == "old"

    def lose_feed(self) -> None:
        self.scheduler.on_cache_feed_lost(self.worker_id(), self.now)

    def flush(self) -> None:
        """Somebody flushes a runtime, which refuses while it works."""
        worker_id = self.worker_id()
        if not any(call.locks for call in self.calls if call.worker_id == worker_id):
            self.caches[worker_id].clear()

    def hear_of_a_flush(self) -> None:
        """The answer to a flush comes at any time, perhaps long after the runtime has told of it."""
        self.scheduler.on_cache_cleared(self.worker_id(), self.now)

    def restart(self) -> None:
        """A runtime dies and comes back behind our back; its requests break."""
        worker_id = self.worker_id()
        for call in [call for call in self.calls if call.worker_id == worker_id]:
            self.scheduler.on_cancel(call.request.request_id, self.now)
            self.calls.remove(call)
        self.caches[worker_id].restart()
        self.on_wire[worker_id] = 0
        self.cut_off.add(worker_id)

    def down(self) -> None:
        worker_id = self.worker_id()
        self.scheduler.on_worker_down(worker_id, self.now)
        self.calls = [call for call in self.calls if call.worker_id != worker_id]
        self.caches[worker_id].restart()
        self.on_wire[worker_id] = 0
        self.cut_off.discard(worker_id)
        self.up(worker_id)

    def up(self, worker_id: WorkerId) -> None:
        cache = self.caches[worker_id]
        self.scheduler.on_worker_up(
            worker_id,
            kv_tokens=cache.num_pages * cache.page_size,
            page_size=cache.page_size,
            profile=A6000_MISTRAL_7B,
            now=self.now,
        )

    def worker_id(self) -> WorkerId:
        return self.rng.choice(list(self.caches))

    def cache(self) -> FakeCache:
        return self.caches[self.worker_id()]

    # What must be true

    def check(self, worker_id: WorkerId) -> None:
        """After the latest batch the tree knows exactly the runtime's pages as certain."""
        self.scheduler.check_invariants()
        cache, feed = self.caches[worker_id], self.scheduler.snapshot().cache_feeds[worker_id]
        if feed.is_live and feed.next_seq == len(cache.batches) and not cache.has_news:
            assert self.certain(worker_id) == cache.pages.keys()
            assert feed.stored_tokens == len(cache.pages) * cache.page_size

    def certain(self, worker_id: WorkerId) -> set[int]:
        shares = [node.shares.get(worker_id) for node in self.scheduler._tree.trie.nodes()]
        return {block for share in shares if share is not None for block in share.blocks or ()}

    def run_down(self) -> None:
        """Let all requests end and all runtimes tell, one batch after the last end included."""
        while self.calls or self.scheduler.num_queued:
            self.progress()
            self.dispatch()
            self.scheduler.check_invariants()
        for worker_id, cache in self.caches.items():
            cache.store([9, 9, *self.tokens()] * 8)
            cache.fit()
            cache.publish()
            feed = self.scheduler.snapshot().cache_feeds[worker_id]
            start = 0 if worker_id in self.cut_off else feed.next_seq
            for seq in range(start, len(cache.batches)):
                self.tell(worker_id, seq)
            counts = self.scheduler.snapshot().cache_feeds[worker_id].counts
            assert not counts.keys() & {"orphan_blocks", "unknown_blocks"}

    def check_equal(self) -> None:
        for _ in range(60):
            tokens, namespace = self.tokens() + self.tokens()[:20], self.rng.choice(NAMESPACES)
            match = self.scheduler._tree.match(namespace, token_ids(tokens).tobytes())
            for worker_id, cache in self.caches.items():
                assert match.len_on(worker_id) == cache.match_len(tokens, namespace)
        for worker in self.scheduler.snapshot().workers:
            cache = self.caches[worker.worker_id]
            if cache.page_size == 1:
                assert worker.used_tokens == len(cache.pages)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("policy", ["round_robin", "preble_e2"])
def test_after_all_was_told_the_tree_has_what_the_runtimes_have(policy: str, seed: int) -> None:
    life = Life(policy, seed, capacity=(128, 256, 2000)[seed % 3])
    for _ in range(300):
        life.step()
        life.scheduler.check_invariants()
    life.run_down()
    life.check_equal()
