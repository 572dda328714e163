"""Calls that fail: made again if asked for, in time or not at all, and reported with what failed."""

import asyncio
from collections.abc import Callable
from itertools import product

import pytest
from pydantic import BaseModel

import preble_sgl as ps
from preble_sgl.core import Completion, OnChunk, Request
from preble_sgl.dsl.interpreter import derive_seed
from tests.fakes import FakeBackend

QUICK = ps.Retry(attempts=3, backoff_s=0.0)


class Flaky(FakeBackend):
    """Fails until `failures` are used up; hangs on prompts that say so."""

    failures = 0
    cancelled = 0

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Fail, hang or answer."""
        if "hang" in self.chat.decode(request.prompt):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.failures:
            self.failures -= 1
            self.requests.append(request)
            raise ps.RequestRejected("the queue is full")
        return await super().generate(request, on_chunk)


@pytest.fixture
def flaky(backend: FakeBackend) -> Flaky:
    """A backend that fails when told to."""
    return Flaky(backend.chat)


@ps.program
async def ask(s: ps.State, text: str, temperature: float = 0.0) -> str:
    return await s.ask(ps.user(text), temperature=temperature)


async def test_without_a_policy_nothing_is_made_again(flaky: Flaky) -> None:
    flaky.failures = 1
    batch = await ask.amap([{"text": "a"}], fleet=flaky, progress=False)
    assert isinstance(batch[0].error, ps.RequestRejected)
    assert (batch[0].failed_call, batch[0].attempts) == ("ask[0]/call0", 1)
    assert batch[0].error.call_path == "ask[0]/call0"


async def test_a_call_is_made_again_with_an_id_and_a_seed_of_its_own(flaky: Flaky) -> None:
    flaky.failures = 2
    batch = await ask.amap(
        [{"text": "a", "temperature": 1.0}], fleet=flaky, progress=False, retry=QUICK, seed=5
    )
    assert batch.values == ["fine"]
    assert batch[0].calls[0].attempts == 3
    assert len({request.request_id for request in flaky.requests}) == 3
    assert {len(request.request_id) for request in flaky.requests} == {32}
    seeds = [request.sampling.seed for request in flaky.requests]
    assert seeds == [derive_seed(5, "ask[0]/call0", attempt) for attempt in range(3)]


async def test_a_call_that_keeps_failing_says_how_often(flaky: Flaky) -> None:
    flaky.failures = 9
    batch = await ask.amap([{"text": "a"}], fleet=flaky, progress=False, retry=QUICK)
    assert (batch[0].ok, batch[0].attempts, flaky.failures) == (False, 3, 6)


async def test_only_the_errors_named_are_retried(flaky: Flaky) -> None:
    flaky.failures = 1
    policy = ps.Retry(attempts=3, backoff_s=0.0, on=(ps.OutputError,))
    with pytest.raises(ps.RequestRejected):
        await ask.using(retry=policy).arun(flaky, "a")


class Point(BaseModel):
    x: int


async def test_an_output_that_does_not_fit_is_drawn_again_and_leaves_no_trace(backend: FakeBackend) -> None:
    answers = iter(['{"x": ', '{"x": 3}', "done"])
    backend.answer = lambda prompt: next(answers)

    @ps.program
    async def locate(s: ps.State) -> tuple[Point, int]:
        point = await s.ask(ps.user("where?"), Point)
        await s.ask(ps.user("sure?"))
        return point, len(s.messages)

    assert await locate.using(retry=QUICK).arun(backend) == (Point(x=3), 4)
    first, again, second = (request.prompt for request in backend.requests)
    assert first == again
    assert second[: len(first)] == first


async def test_a_program_may_catch_an_error_and_go_on_from_where_it_was(backend: FakeBackend) -> None:
    answers = iter(["nonsense", "fine"])
    backend.answer = lambda prompt: next(answers)

    @ps.program
    async def careful(s: ps.State) -> str:
        s += ps.user("How many?")
        try:
            return str(await s.gen(int))
        except ps.OutputError:
            return await s.gen()

    assert await careful.arun(backend) == "fine"
    assert backend.requests[0].prompt == backend.requests[1].prompt


async def test_a_call_over_its_time_is_aborted(flaky: Flaky) -> None:
    with pytest.raises(ps.DeadlineError, match=r"no answer within 0\.01 s"):
        await ask.using(call_timeout_s=0.01).arun(flaky, "hang")
    assert flaky.cancelled == 1


async def test_a_gen_can_have_a_time_of_its_own(flaky: Flaky) -> None:
    @ps.program
    async def impatient(s: ps.State) -> str:
        return await s.ask(ps.user("hang"), timeout_s=0.01)

    with pytest.raises(ps.DeadlineError, match="no answer within"):
        await impatient.arun(flaky)


async def test_a_row_over_its_time_fails_alone_and_the_scheduler_knew_when(flaky: Flaky) -> None:
    rows = [{"text": "hang"}, {"text": "quick"}]
    before = asyncio.get_running_loop().time()
    batch = await ask.amap(rows, fleet=flaky, progress=False, timeout_s=0.05)
    assert isinstance(batch[0].error, ps.DeadlineError)
    assert "ask[0]: not finished within 0.05 s, after 0 calls" in str(batch[0].error)
    assert batch[1].value == "fine"
    assert flaky.cancelled == 1
    assert all(hint.deadline_at is not None and hint.deadline_at > before for hint in flaky.hints)


def test_seeds_differ_by_run_seed_call_and_sample_and_repeat() -> None:
    parts = list(product((0, 1), ("p[0]/call0", "p[1]/call0"), (0, 1)))
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == 8
    assert seeds == [derive_seed(*part) for part in parts]
    assert all(0 <= seed < 1 << 31 for seed in seeds)


async def test_forks_sample_different_seeds_and_greedy_calls_have_none(backend: FakeBackend) -> None:
    @ps.program
    async def samples(s: ps.State) -> None:
        s += ps.user("Say something.")
        await s.map(range(4), lambda branch, i: branch.gen(temperature=1.0))
        await s.gen()
        await s.ask(ps.user("again"), temperature=1.0, seed=7)

    await samples.arun(backend)
    *drawn, greedy, given = (request.sampling.seed for request in backend.requests)
    assert len(set(drawn)) == 4
    assert (greedy, given) == (None, 7)


async def test_two_generations_at_once_on_one_branch_are_refused(backend: FakeBackend) -> None:
    @ps.program
    async def confused(s: ps.State) -> None:
        s += ps.user("Well?")
        await asyncio.gather(s.gen(), s.gen())

    with pytest.raises(ps.InputError, match="this branch is generating: fork first"):
        await confused.arun(backend)


async def test_a_branch_that_is_done_makes_no_more_calls(backend: FakeBackend) -> None:
    @ps.program
    async def ends(s: ps.State) -> None:
        (branch,) = s.fork(1)
        await branch.ask(ps.user("last"))
        branch.done()
        branch.done()
        await branch.ask(ps.user("one more"))

    with pytest.raises(ps.InputError, match="this branch has ended"):
        await ends.arun(backend)
    assert len(backend.given_back) == 1
    assert backend.given_back[0] > 0


@pytest.mark.parametrize("make", [lambda: ps.Retry(attempts=0), lambda: ps.Retry(backoff_s=-1.0)])
def test_impossible_policies_are_refused(make: Callable[[], ps.Retry]) -> None:
    with pytest.raises(ValueError, match="at least 1 attempt"):
        make()
