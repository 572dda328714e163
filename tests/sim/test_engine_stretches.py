"""A stretch of decode steps is a shorthand: it changes neither what is computed nor when."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from preble_sgl.core import CacheEvent, Request, RequestId, TokenIds, token_ids
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import Finished
from preble_sgl.sim.step_cost import StepCost
from preble_sgl.sim.wait_queue import WaitOrder
from tests.sim.engines import engine, output_of, request, run, step, submit

Action = Callable[[Engine], object]

COST = StepCost(floor_s=0.5, base_s=0.1, token_s=0.01, context_s=0.001, attention_pair_s=1e-5)


# Stories. Every iteration takes a second.


@pytest.mark.parametrize(
    ("now", "ends_at"), [(1.0, 2), (1.5, 2), (2.0, 2), (5.5, 6), (99.5, 100), (100, 100)]
)
def test_a_stretch_is_cut_at_the_first_step_end_at_or_after_now(now: float, ends_at: float) -> None:
    one = engine()
    submit(one, "a", range(10), 100)
    step(one, 0.0)
    assert one.start(1.0) == 100
    assert one.cut(now) == ends_at
    assert one.finish().ended_at == ends_at
    one.check_invariants()
    if ends_at < 100:
        assert one.output_len(RequestId("a")) == ends_at


def test_a_stretch_ends_when_the_first_request_does() -> None:
    one = engine()
    submit(one, "a", range(10), 100)
    submit(one, "b", range(100, 110), 30)
    step(one, 0.0)
    assert one.start(1.0) == 30
    assert [finished.request_id for finished in one.finish().finished] == ["b"]
    assert one.start(30.0, max_decode_steps=7) == 37


def test_a_prefill_is_not_cut() -> None:
    one = engine()
    submit(one, "a", range(10))
    assert one.start(0.0) == 1
    submit(one, "b", range(10), now=0.5)
    assert one.cut(0.5) == 1


def test_a_full_batch_does_not_heed_what_arrives() -> None:
    one = engine(max_running=1)
    submit(one, "a", range(10), 100)
    submit(one, "b", range(10), 100)
    step(one, 0.0)
    assert one.start(1.0) == 100
    submit(one, "c", range(10), now=5.5)
    assert one.cut(5.5) == 100


def test_a_full_batch_heeds_an_abort_of_what_runs() -> None:
    one = engine(max_running=1)
    submit(one, "a", range(10), 100)
    submit(one, "b", range(100, 110), 5)
    step(one, 0.0)
    assert one.start(1.0) == 100
    assert one.abort(RequestId("a"))
    assert one.cut(5.5) == 6
    assert one.finish().finished == []
    [finished] = run(one, 6.0)
    assert (finished.request_id, finished.first_token_at) == ("b", 7)


def test_a_stretch_ends_where_a_pin_expires() -> None:
    one = engine()
    submit(one, "a", range(10), 1)
    run(one)
    one.pins.pin("", token_ids(range(10)).tobytes(), until=20.5)
    submit(one, "b", range(100, 110), 100, 10.0)
    step(one, 10.0)
    assert one.start(11.0) == 21
    one.finish()
    assert one.start(21.0) == 110


@pytest.mark.parametrize(("every", "ends"), [(40, [1, 41, 81, 100]), (1, [1, 2, 3]), (None, [1, 100])])
def test_a_stretch_ends_where_events_are_published(every: int | None, ends: list[int]) -> None:
    one = engine(publish_every=every)
    submit(one, "a", range(10), 100)
    now = 0.0
    for ends_at in ends:
        result = step(one, now)
        assert result is not None
        now = result.ended_at
        assert now == ends_at
        assert bool(result.events) == (every is not None and now in (1, 100))


# Random workloads


@dataclass
class Watched:
    """An engine with what it told, driven from action to action."""

    engine: Engine
    max_decode_steps: int | None
    ends_at: float | None = None
    now: float = 0.0
    finished: list[Finished] = field(default_factory=list)
    first_tokens: list[tuple[float, str]] = field(default_factory=list)
    events: list[CacheEvent] = field(default_factory=list)
    num_iterations: int = 0

    def act(self, at: float, action: Action) -> None:
        """Let time pass until `at`, and do something then."""
        self.run(at)
        self.now = at
        action(self.engine)
        if self.engine.is_running:
            self.ends_at = self.engine.cut(at)

    def run(self, until: float = float("inf")) -> None:
        """Finish and start iterations while they end by `until`."""
        while True:
            if self.ends_at is None:
                self.ends_at = self.engine.start(self.now, max_decode_steps=self.max_decode_steps)
            if self.ends_at is None or self.ends_at > until:
                return
            self._finish()

    def _finish(self) -> None:
        result = self.engine.finish()
        self.num_iterations += 1
        self.now, self.ends_at = result.ended_at, None
        self.finished += result.finished
        self.first_tokens += [(result.ended_at, str(name)) for name in result.first_tokens]
        self.events += result.events


def aborting(name: str) -> Action:
    return lambda one: one.abort(RequestId(name))


def submitting(asked: Request, output: TokenIds, now: float) -> Action:
    return lambda one: one.submit(asked, output, now)


def actions(rng: random.Random) -> Iterator[tuple[float, Action]]:
    """Yield requests that share prefixes, and aborts of a few of them, at random instants."""
    now, names = 0.0, list[str]()
    for number in range(40):
        now += rng.expovariate(rng.choice([0.05, 0.3, 2.0]))
        if names and rng.random() < 0.15:
            name = rng.choice(names)
            yield now, aborting(name)
            continue
        first = rng.randrange(6) * 1000
        prompt = [*range(first, first + rng.choice([1, 20, 60])), *range(number * 50, number * 50 + 10)]
        name, output_len, limit_len = f"r{number}", rng.choice([0, 1, 60, 200, 400]), rng.choice([0, 50])
        asked = request(name, prompt, output_len + limit_len)
        output = output_of(name, output_len)
        names.append(name)
        yield now, submitting(asked, output, now)


def live(config: EngineConfig, seed: str, max_decode_steps: int | None) -> Watched:
    """Run the workload of a seed on a new engine that begins with a pinned prefix."""
    one = Watched(Engine(config), max_decode_steps)
    rng = random.Random(seed)
    submit(one.engine, "pinned", range(20), 1)
    one.run()
    one.engine.pins.pin("", token_ids(range(20)).tobytes(), until=rng.uniform(10, 200))
    start = one.now
    for at, action in actions(rng):
        one.act(start + at, action)
    one.run()
    one.engine.check_invariants()
    return one


@pytest.mark.parametrize("order", ["fcfs", "lpm", "preble_groups"])
@pytest.mark.parametrize(
    ("page_size", "chunk_tokens", "mixed"), [(1, None, False), (1, 32, True), (16, 64, False)]
)
def test_long_stretches_give_exactly_what_single_steps_give(
    order: WaitOrder, page_size: int, chunk_tokens: int | None, mixed: bool
) -> None:
    num_saved = num_retractions = 0
    for seed in range(12):
        config = EngineConfig(
            step=COST,
            kv_tokens=(600, 900, 5000)[seed % 3],
            page_size=page_size,
            chunk_tokens=chunk_tokens,
            mixed_chunk=mixed,
            order=order,
            max_running=(3, 100)[seed % 2],
            publish_every=(None, 40, 1, 7)[seed % 4],
        )
        name = f"{order} {page_size} {seed}"
        long, single = live(config, name, None), live(config, name, 1)
        assert [bare(one) for one in long.finished] == [bare(one) for one in single.finished]
        for one, other in zip(long.finished, single.finished, strict=True):
            assert instants(one) == pytest.approx(instants(other), abs=1e-9)
        assert [name for _, name in long.first_tokens] == [name for _, name in single.first_tokens]
        assert long.engine.load().prefilled_tokens == single.engine.load().prefilled_tokens
        assert long.engine.cache.num_evicted == single.engine.cache.num_evicted
        assert long.events == single.events
        num_saved += single.num_iterations - long.num_iterations
        num_retractions += sum(one.num_retractions for one in long.finished)
    assert num_saved > 1000
    assert num_retractions > 4


def bare(one: Finished) -> tuple[object, ...]:
    """Return everything but the instants."""
    return one.request_id, one.usage, one.first_token_at is None, one.num_retractions


def instants(one: Finished) -> list[float]:
    return [one.submitted_at, one.first_token_at or 0.0, one.finished_at]
