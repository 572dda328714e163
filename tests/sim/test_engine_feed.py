"""An engine that tells the global scheduler of its cache: then the scheduler knows what it has."""

import random
from collections.abc import Iterator

import pytest

from preble_sgl.core import CacheEvent, TokenIds, WorkerId, token_ids
from preble_sgl.errors import RequestRejected
from preble_sgl.global_sched import GlobalScheduler, make_policy
from preble_sgl.profiles import load_profile
from preble_sgl.sim.arrivals import poisson
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.points import OpenLoop, Setting
from preble_sgl.sim.virtual_time import VirtualTime
from preble_sgl.sim.workloads import Session, Turn, random_tokens
from tests.global_sched.fake_cache import hashes
from tests.sim.engines import engine, request, step, submit
from tests.sim.test_kv_cache import hear

WORKER = WorkerId("w0")
PROFILE = load_profile("a6000-mistral-7b")


class Listener:
    """A scheduler with one worker that hears what an engine publishes, and a set of pages that does, too."""

    def __init__(self, one: Engine) -> None:
        self.engine = one
        self.scheduler = GlobalScheduler(make_policy("round_robin"), rng=random.Random(0))
        self.scheduler.on_worker_up(
            WORKER,
            kv_tokens=one.config.kv_tokens,
            page_size=one.config.page_size,
            profile=PROFILE.cost,
            now=0.0,
        )
        self.told: set[int] = set()
        self.seq = 0

    def hear(self, events: list[CacheEvent], now: float) -> None:
        if events:
            self.scheduler.on_cache_events(WORKER, self.seq, events, now)
            self.scheduler.check_invariants()
            hear(self.told, events, self.engine.config.page_size)
            self.seq += 1

    def match_len(self, prompt: TokenIds, namespace: str) -> int:
        """Return the cached tokens that the scheduler knows of."""
        return self.scheduler._tree.match(namespace, prompt.tobytes()).len_on(WORKER)

    def told_len(self, prompt: TokenIds, namespace: str) -> int:
        """Return the cached tokens by the pages that were told."""
        pages = hashes(prompt, self.engine.config.page_size, namespace)
        num = next((i for i, page in enumerate(pages) if page not in self.told), len(pages))
        return num * self.engine.config.page_size


def prompts(rng: random.Random) -> Iterator[tuple[TokenIds, str]]:
    """Yield prompts that share prefixes of many lengths, each with its namespace."""
    trunks = [random_tokens(rng, 150) for _ in range(4)]
    while True:
        trunk = rng.choice(trunks)
        yield trunk[: rng.randrange(150)] + random_tokens(rng, rng.randint(1, 60)), rng.choice(["", "salt"])


@pytest.mark.parametrize("kv_tokens", [600, 3000])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_scheduler_matches_exactly_what_the_engine_then_reports_as_cached(
    page_size: int, kv_tokens: int
) -> None:
    rng = random.Random(f"{page_size} {kv_tokens}")
    one = engine(kv_tokens=kv_tokens, page_size=page_size, chunk_tokens=64, publish_every=1)
    listener, now, some = Listener(one), 0.0, prompts(rng)
    for number in range(150):
        prompt, namespace = next(some)
        assert listener.told_len(prompt, namespace) == listener.match_len(prompt, namespace)
        expected = listener.match_len(prompt[:-1], namespace)  # the last token is computed in any case
        submit(one, f"{number}", prompt, rng.randint(0, 20), now, namespace=namespace)
        while result := step(one, now):
            now = result.ended_at
            listener.hear(list(result.events), now)
            for finished in result.finished:
                assert finished.usage.cached_tokens == expected
        assert len(listener.told) * page_size == one.cache.num_cached
    assert kv_tokens > 600 or one.cache.num_evicted > 0
    assert one.flush_cache()
    listener.hear(one.cache.take_events(), now)
    assert listener.match_len(*next(some)) == 0


def test_many_at_once_under_pressure_leave_the_scheduler_with_what_is_cached() -> None:
    rng = random.Random(5)
    one = engine(kv_tokens=900, chunk_tokens=64, publish_every=40)
    listener, now, some = Listener(one), 0.0, prompts(rng)
    for number in range(300):
        prompt, namespace = next(some)
        asked = request(f"{number}", prompt, 50, namespace=namespace)
        one.submit(asked, random_tokens(rng, rng.randrange(40)), now)
        for _ in range(rng.randrange(8)):
            if (result := step(one, now, max_decode_steps=rng.choice([1, 10]))) is not None:
                now = result.ended_at
                listener.hear(list(result.events), now)
    while result := step(one, now):
        now = result.ended_at
        listener.hear(list(result.events), now)
    assert one.cache.num_evicted > 0
    assert len(listener.told) == one.cache.num_cached
    for _ in range(200):
        prompt, namespace = next(some)
        assert listener.match_len(prompt, namespace) == listener.told_len(prompt, namespace)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_simulated_fleet_tells_its_scheduler(page_size: int) -> None:
    rng = random.Random(page_size)
    some = prompts(rng)
    sessions = [Session((Turn(next(some)[0], random_tokens(rng, 20)),), 0) for _ in range(200)]
    setting = Setting(
        policy="preble_e2", gpus=2, profile=PROFILE, page_size=page_size, kv_tokens=2000, cache_events=True
    )
    clock = VirtualTime()
    loop = OpenLoop(setting.fleet(clock), clock, iter(sessions), poisson(50.0, random.Random(1)))
    loop.begin()
    clock.run()
    fleet = loop.fleet
    fleet.check_invariants()
    assert len(loop.records) == 200
    feeds = fleet.scheduler.snapshot().cache_feeds
    for worker_id, runtime in fleet._runtimes.items():
        cache = runtime.engine.cache
        assert feeds[worker_id].is_live
        assert feeds[worker_id].stored_tokens == cache.num_cached
        assert not feeds[worker_id].counts.keys() & {"orphan_blocks", "unknown_blocks"}
        assert cache.num_evicted > 0
        for session in sessions:
            packed = session.turns[0].new.tobytes()
            known_len = fleet.scheduler._tree.match("", packed).len_on(worker_id)
            assert known_len == cache.match(cache.root(""), packed, len(packed) // 4).end_len


def test_a_refused_request_changes_nothing_that_is_told() -> None:
    one = engine(kv_tokens=100, publish_every=1)
    with pytest.raises(RequestRejected):
        submit(one, "a", token_ids(range(200)))
    assert one.cache.take_events() == []
