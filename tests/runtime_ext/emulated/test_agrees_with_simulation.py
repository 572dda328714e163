"""An emulated runtime and the engine model played in virtual time give the same requests the same fate."""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

import pytest

from preble_sgl.core import Usage
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.driver import Answer, Driver
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import Finished
from preble_sgl.sim.step_cost import StepCost
from tests.runtime_ext.emulated.runtimes import Emulated, running

NUM_REQUESTS = 40
MEAN_GAP_S = 0.01
OVERHEAD_S = 0.1
"""Far longer than a call takes from its arrival to the driver, so none misses its iteration."""

ENGINE = EngineConfig(
    step=StepCost(floor_s=0.001, base_s=0.001, token_s=1e-5, request_s=1e-4, context_s=1e-7),
    kv_tokens=800,
    chunk_tokens=128,
)
"""So little room that requests wait for it, prompts are chunked and cached prefixes evicted."""

Asked = tuple[list[int], int]


def workload(rng: random.Random) -> list[Asked]:
    """Prompts that share four prefixes, and the lengths of their outputs."""
    prefixes = [[rng.randrange(1000) for _ in range(rng.randint(100, 300))] for _ in range(4)]
    return [
        (
            rng.choice(prefixes) + [rng.randrange(1000) for _ in range(rng.randint(5, 60))],
            rng.randint(1, 100),
        )
        for _ in range(NUM_REQUESTS)
    ]


async def ask(emulated: Emulated, asked: Sequence[Asked], rng: random.Random) -> list[Usage]:
    """Send all, a little apart; return what the clients were told."""
    answers = []
    async with asyncio.TaskGroup() as group:
        for prompt, num_tokens in asked:
            answers.append(group.create_task(emulated.generate(*prompt, max_new_tokens=num_tokens)))
            await asyncio.sleep(rng.expovariate(1 / MEAN_GAP_S))
    metas = [answer.result()["meta_info"] for answer in answers]
    return [Usage(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"]) for meta in metas]


def play(answers: Sequence[Answer]) -> list[Finished]:
    """Let an engine compute the same requests, which reach it at the same instants, in virtual time."""
    engine = Engine(ENGINE)
    coming = deque(sorted(answers, key=attrgetter("arrived_at")))
    finished: list[Finished] = []

    def arrive() -> float:
        answer = coming.popleft()
        engine.submit(answer.request, answer.script.ids, answer.arrived_at + OVERHEAD_S)
        return answer.arrived_at + OVERHEAD_S

    now = 0.0
    while coming or engine.has_work:
        if not engine.has_work:
            now = max(now, arrive())
        while coming and coming[0].arrived_at + OVERHEAD_S <= now:
            arrive()
        ends_at = engine.start(now)
        assert ends_at is not None
        while coming and coming[0].arrived_at + OVERHEAD_S < ends_at:
            ends_at = engine.cut(arrive())
        now = ends_at
        finished += engine.finish().finished
    return finished


def by_end(finished: Sequence[Finished]) -> list[Finished]:
    return sorted(finished, key=attrgetter("finished_at", "request_id"))


async def test_an_emulated_runtime_does_what_the_engine_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Answer] = []
    submit = Driver.submit

    def remember(driver: Driver, answer: Answer) -> None:
        answers.append(answer)
        submit(driver, answer)

    monkeypatch.setattr(Driver, "submit", remember)
    rng = random.Random(0)
    config = EmulatedConfig(engine=ENGINE, profile="test", overhead_s=OVERHEAD_S)
    async with running(config) as emulated:
        told = await ask(emulated, workload(rng), rng)

    emulated_ends = by_end([answer.finished for answer in answers if answer.finished])
    played_ends = by_end(play(answers))
    assert len(emulated_ends) == len(told) == NUM_REQUESTS
    assert [one.request_id for one in emulated_ends] == [one.request_id for one in played_ends]
    for emulated_end, played_end in zip(emulated_ends, played_ends, strict=True):
        assert emulated_end.usage == played_end.usage
        assert emulated_end.num_retractions == played_end.num_retractions
        assert emulated_end.submitted_at == played_end.submitted_at
        assert emulated_end.first_token_at == pytest.approx(played_end.first_token_at, abs=1e-8)
        assert emulated_end.finished_at == pytest.approx(played_end.finished_at, abs=1e-8)
    assert sum(told, Usage()) == sum((one.usage for one in played_ends), Usage())
