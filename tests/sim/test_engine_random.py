"""Random lives of an engine: nothing is lost, nothing leaks, whatever happens in whatever order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from preble_sgl.core import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    RequestId,
    TokenIds,
    token_ids,
)
from preble_sgl.errors import RequestRejected
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import Finished
from preble_sgl.sim.step_cost import StepCost
from preble_sgl.sim.wait_queue import WaitOrder
from tests.sim.engines import submit

STEP = StepCost(floor_s=0.5, base_s=0.1, token_s=0.01, context_s=0.001, attention_pair_s=1e-5)


@dataclass
class Life:
    """An engine under random actions, with what it owes us."""

    engine: Engine
    rng: random.Random
    now: float = 0.0
    number: int = 0
    owed: dict[RequestId, tuple[int, int]] = field(default_factory=dict)
    finished: list[Finished] = field(default_factory=list)
    told: set[int] = field(default_factory=set)
    ends_at: float | None = None

    def submit(self) -> None:
        self.number += 1
        name = f"r{self.number:05d}"
        prompt = [token for _ in range(self.rng.randrange(1, 6)) for token in self._segment()]
        output_len = self.rng.choice([0, 1, 2, 10, 60, 150])
        try:
            submit(self.engine, name, prompt, output_len, self.now)
        except RequestRejected:
            assert len(prompt) > self.engine.max_input_len
            return
        self.owed[RequestId(name)] = (len(prompt), output_len)
        if self.ends_at is not None:
            self.ends_at = self.engine.cut(self.now)
            assert self.ends_at >= self.now

    def abort(self) -> None:
        if self.owed:
            request_id = self.rng.choice(sorted(self.owed))
            del self.owed[request_id]
            assert self.engine.abort(request_id)
        assert not self.engine.abort(RequestId("nobody"))

    def go_on(self) -> None:
        if self.ends_at is None:
            limit = self.rng.choice([None, 1, 3])
            self.ends_at = self.engine.start(self.now, max_decode_steps=limit)
            assert (self.ends_at is None) == (not self.owed)
            return
        if self.rng.random() < 0.3:
            self.now += (self.ends_at - self.now) * self.rng.random()
            return
        self.now, self.ends_at = self.ends_at, None
        result = self.engine.finish()
        assert result.ended_at == self.now
        self._take(result.finished)
        self._hear(result.events)
        self.engine.check_invariants()

    def pin(self) -> None:
        if self.ends_at is None:
            packed = self._segment().tobytes()
            self.engine.pins.pin("", packed, self.now + self.rng.random() * 50)

    def end(self) -> None:
        while self.owed or self.ends_at is not None:
            self.go_on()
        assert self.engine.flush_cache()
        self.engine.check_invariants()
        assert self.engine.cache.num_free == self.engine.cache.capacity
        self._hear(self.engine.cache.take_events())
        assert not self.told

    def _segment(self) -> TokenIds:
        first = self.rng.randrange(8) * 100
        return token_ids(range(first, first + self.rng.choice([1, 16, 40])))

    def _take(self, finished: Sequence[Finished]) -> None:
        for one in finished:
            prompt_len, output_len = self.owed.pop(one.request_id)
            assert one.usage.prompt_tokens == prompt_len
            assert one.usage.output_tokens <= output_len
            assert 0 <= one.usage.cached_tokens < prompt_len
            assert (one.first_token_at is None) == (one.usage.output_tokens == 0)
            assert one.submitted_at <= (one.first_token_at or one.finished_at) <= one.finished_at == self.now
            if prompt_len + output_len <= self.engine.max_input_len:
                assert one.usage.output_tokens == output_len
            self.finished.append(one)

    def _hear(self, events: Sequence[CacheEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    assert event.parent_hash is None or event.parent_hash in self.told
                    assert not self.told & set(event.block_hashes), "a page is stored once"
                    self.told |= set(event.block_hashes)
                case BlocksRemoved():
                    assert set(event.block_hashes) <= self.told
                    self.told -= set(event.block_hashes)
                case CacheCleared():
                    self.told.clear()


@pytest.mark.parametrize("order", ["fcfs", "lpm", "preble_groups"])
@pytest.mark.parametrize(("page_size", "chunk"), [(1, None), (1, 64), (4, 32), (16, 64)])
@pytest.mark.parametrize("mixed", [False, True])
def test_random_lives_lose_no_token_and_no_request(
    order: WaitOrder, page_size: int, chunk: int | None, mixed: bool
) -> None:
    for seed in range(4):
        rng = random.Random(f"{order} {page_size} {chunk} {mixed} {seed}")
        config = EngineConfig(
            step=STEP,
            kv_tokens=rng.choice([150, 400, 5000]),
            page_size=page_size,
            chunk_tokens=chunk,
            order=order,
            mixed_chunk=mixed,
            max_running=rng.choice([2, 100]),
            publish_every=rng.choice([1, 40]),
        )
        life = Life(Engine(config), rng)
        actions = [*[life.submit] * 3, life.abort, life.pin, *[life.go_on] * 6]
        for _ in range(450):
            rng.choice(actions)()
        life.end()
        assert life.finished


def test_the_same_life_twice_is_the_same() -> None:
    def records(seed: int) -> list[Finished]:
        life = Life(Engine(EngineConfig(step=STEP, kv_tokens=400, publish_every=40)), random.Random(seed))
        for _ in range(500):
            life.rng.choice([life.submit, life.abort, *[life.go_on] * 4])()
        life.end()
        return life.finished

    assert records(1) == records(1)
    assert records(1) != records(2)
