"""Programs on simulated workers: as on real ones, but for the clock and the words."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import preble_sgl as ps
from preble_sgl.commands.demo import DIMENSIONS, QUESTIONS, Job, demo_jobs
from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, WorkerId, token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.predict import WorkerSpec, predict
from preble_sgl.profiles import load_profile
from preble_sgl.sim.distributions import Constant
from preble_sgl.sim.points import Setting
from preble_sgl.sim.programs import ScriptedAnswers, SimulatedBackend, random_answers
from preble_sgl.sim.report import Summary
from preble_sgl.sim.virtual_loop import VirtualLoop

PROFILE = load_profile("a6000-mistral-7b")
NUM_DOCUMENTS = 8


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.load(tiny_model)


def setting(policy: str = "preble_plan", *, gpus: int = 2, kv_tokens: int | None = None) -> Setting:
    return Setting(policy=policy, gpus=gpus, profile=PROFILE, kv_tokens=kv_tokens)


@pytest.fixture
def backend(chat: ChatFormat) -> Iterator[SimulatedBackend]:
    """One worker that answers in ordinary words; afterwards nothing may be left on it."""
    one = SimulatedBackend(setting(gpus=1), ScriptedAnswers(chat), chat=chat)
    yield one
    one.close()
    one.fleet.check_invariants()
    assert one.fleet.scheduler.num_running == 0


def run_job(job: Job, policy: str, chat: ChatFormat) -> tuple[Plan, ps.Batch[Any], int, Summary]:
    """Return the plan, the rows, the cached tokens and the summary of a planned batch on two workers."""
    with closing(SimulatedBackend(setting(policy), ScriptedAnswers(chat), chat=chat)) as backend:
        plan = job.program.plan(job.rows, fleet=backend)
        batch = job.program.map(job.rows, fleet=backend, plan=plan, progress=False)
    backend.fleet.check_invariants()
    state = backend.fleet.scheduler.snapshot()
    assert (state.num_open_programs, state.num_queued, state.num_held, state.num_running) == (0, 0, 0, 0)
    cached = sum(record.usage.cached_tokens for record in backend.records)
    return plan, batch, cached, backend.summary()


@pytest.mark.parametrize("policy", ["preble_plan", "preble_e2", "round_robin"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_shipped_programs_reuse_what_their_plans_predict(
    chat: ChatFormat, index: int, policy: str
) -> None:
    job = demo_jobs()[index]
    plan, batch, cached, summary = run_job(job, policy, chat)
    assert [row.error for row in batch] == [None] * NUM_DOCUMENTS
    assert [row.num_calls for row in batch] == [5] * NUM_DOCUMENTS
    assert (len(plan.calls), summary.finished, summary.failed) == (40, 40, 0)
    workers = [WorkerSpec(WorkerId(f"gpu{i:03d}"), PROFILE.kv_tokens, 1, PROFILE.cost) for i in range(2)]
    assert cached == predict(plan, workers, policy).cached_tokens == batch.usage.cached_tokens
    assert batch.usage.prompt_tokens == plan.prompt_tokens
    if policy == "round_robin":
        assert cached < 0.8 * plan.reusable_tokens
    else:  # all documents begin at once, so each computes the few tokens before it
        assert 0 <= plan.reusable_tokens - cached < 20 * NUM_DOCUMENTS


def test_results_have_the_declared_types(chat: ChatFormat) -> None:
    document_qa, judge = demo_jobs()
    _, answers, _, _ = run_job(document_qa, "preble_plan", chat)
    _, verdicts, _, _ = run_job(judge, "preble_plan", chat)
    assert [len(values) for values in answers.values] == [len(QUESTIONS)] * NUM_DOCUMENTS
    assert {(v.score, v.decision, v.reason) for v in verdicts.values} == {(1, "accept", "x")}
    assert {row.num_calls for row in verdicts} == {len(DIMENSIONS) + 1}


@pytest.mark.parametrize("policy", ["preble_plan", "power_of_two"])
def test_two_runs_are_alike(chat: ChatFormat, policy: str) -> None:
    judge = demo_jobs()[1]
    _, first, _, one = run_job(judge, policy, chat)
    _, second, _, other = run_job(judge, policy, chat)
    assert one == other
    assert [row.value for row in first] == [row.value for row in second]
    assert [row.usage for row in first] == [row.usage for row in second]


@ps.program
async def nap(s: ps.State, seconds: float) -> str:
    s += ps.user("Sleep well.")
    await asyncio.sleep(seconds)
    return await s.gen(max_tokens=4)


def test_sleep_takes_virtual_time_and_no_real_time(backend: SimulatedBackend) -> None:
    async def sleep() -> None:
        await asyncio.sleep(1e6)

    backend.call(sleep)
    assert backend.loop.time() == 1e6
    nap.map([{"seconds": 2e6}, {"seconds": 1e6}], fleet=backend, progress=False)
    assert [record.submitted_at for record in backend.records] == [2e6, 3e6]


def test_a_timeout_gives_a_call_up_in_virtual_time(backend: SimulatedBackend) -> None:
    @ps.program
    async def impatient(s: ps.State, patience_s: float) -> str:
        s += ps.user("Take your time.")
        try:
            async with asyncio.timeout(patience_s):
                return await s.gen(max_tokens=1000)
        except TimeoutError:
            return f"gave up at {asyncio.get_running_loop().time():g}"

    batch = impatient.map([{"patience_s": 0.5}, {"patience_s": 1e6}], fleet=backend, progress=False)
    first, second = batch.values
    assert first == "gave up at 0.5"
    assert len(second) > 1000
    assert [row.num_calls for row in batch] == [0, 1]
    assert len(backend.records) == 1


async def wait_until_running(backend: SimulatedBackend, num: int) -> None:
    while backend.fleet.scheduler.num_running < num:
        await asyncio.sleep(0.001)


def test_cancelling_a_row_aborts_its_calls_and_spares_the_others(backend: SimulatedBackend) -> None:
    @ps.program
    async def two(s: ps.State) -> list[str]:
        s += ps.user("Count.")
        return await s.map(["up", "down"], lambda b, way: b.ask(ps.user(way), max_tokens=100))

    async def cancel_one() -> list[str]:
        given_up, other = (asyncio.ensure_future(two.arun(backend)) for _ in range(2))
        await wait_until_running(backend, 4)
        await asyncio.sleep(0.2)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert given_up.cancelled()
        assert backend.fleet.scheduler.num_running == 2
        return await other

    assert len(backend.call(cancel_one)) == 2
    assert [record.usage.output_tokens for record in backend.records] == [100, 100]


def lone_request(name: str) -> Request:
    return Request(
        request_id=RequestId(name),
        program_id=ProgramId(name),
        call_path=name,
        prompt=token_ids(range(100)),
        sampling=SamplingParams(max_new_tokens=10, ignore_eos=True),
    )


def test_a_call_may_be_cancelled_in_the_instant_of_its_end() -> None:
    backend = SimulatedBackend(setting("round_robin", gpus=1), random_answers())

    async def cancel_at_the_end() -> None:
        await backend.generate(lone_request("first"))
        (record,) = backend.records
        begins_at = backend.loop.time()
        await backend.generate(lone_request("second"))
        takes_s = backend.loop.time() - begins_at
        assert takes_s < record.finished_at  # its prompt was cached
        task = asyncio.ensure_future(backend.generate(lone_request("third")))
        backend.loop.call_at(backend.loop.time() + takes_s - 5e-10, task.cancel)  # less than a clock's tick
        with pytest.raises(asyncio.CancelledError):
            await task

    with closing(backend):
        backend.call(cancel_at_the_end)
    assert backend.fleet.scheduler.num_running == 0
    backend.fleet.check_invariants()


def test_a_regex_needs_a_script_and_the_other_rows_go_on(backend: SimulatedBackend) -> None:
    @ps.program
    async def pick(s: ps.State, regex: str | None) -> str:
        s += ps.user("A number?")
        return await (s.gen(max_tokens=6) if regex is None else s.gen(max_tokens=6, regex=regex))

    batch = pick.map([{"regex": regex} for regex in (None, "[0-9]+", None)], fleet=backend, progress=False)
    assert [row.ok for row in batch] == [True, False, True]
    error = batch[1].error
    assert isinstance(error, InputError)
    assert "call pick[1]/call0: a regex needs a script: pass `answers` of your own" in str(error)
    assert backend.summary().finished == 2


def test_a_prompt_that_is_longer_than_the_cache_is_rejected_in_its_row(chat: ChatFormat) -> None:
    @ps.program
    async def echo(s: ps.State, text: str) -> str:
        s += ps.user(text)
        return await s.gen(max_tokens=4)

    small = setting(gpus=1, kv_tokens=200)
    with closing(SimulatedBackend(small, ScriptedAnswers(chat), chat=chat)) as backend:
        batch = echo.map([{"text": "short"}, {"text": "long " * 300}], fleet=backend, progress=False)
    assert [row.ok for row in batch] == [True, False]
    assert isinstance(batch[1].error, RequestRejected)
    summary = backend.summary()
    assert (summary.finished, summary.failed) == (1, 1)
    backend.fleet.check_invariants()


def test_select_takes_the_first_choice_at_the_cost_of_scoring_all(backend: SimulatedBackend) -> None:
    @ps.program
    async def choose(s: ps.State) -> str:
        s += ps.user("Tea or coffee?")
        return (await s.select(["tea", "coffee"])).value

    (row,) = choose.map([{}], fleet=backend, progress=False)
    assert (row.value, row.num_calls) == ("tea", 2)


def test_answers_are_as_long_as_a_script_says_and_a_call_allows(chat: ChatFormat) -> None:
    @ps.program
    async def say(s: ps.State, most: int) -> str:
        s += ps.user("Say something.")
        return await s.gen(max_tokens=most)

    answers = ScriptedAnswers(chat, output=Constant(7))
    with closing(SimulatedBackend(setting(), answers, chat=chat)) as backend:
        batch = say.map([{"most": most} for most in (3, 7, 20)], fleet=backend, progress=False)
    assert [row.usage.output_tokens for row in batch] == [3, 7, 7]


def test_without_a_tokenizer_programs_are_refused_with_the_remedy() -> None:
    with (
        closing(SimulatedBackend(setting(), random_answers())) as backend,
        pytest.raises(InputError, match=r"give `chat=ChatFormat.load\(model_path\)`"),
    ):
        nap.plan([{"seconds": 0}], fleet=backend)


def test_waiting_for_what_never_happens_is_an_error() -> None:
    loop = VirtualLoop()

    async def wait() -> None:
        await loop.create_future()

    task = loop.create_task(wait())
    with pytest.raises(RuntimeError, match="everything waits for something that never happens in a sim"):
        loop.run_until_complete(task)
    assert loop.time() == 0.0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def test_a_row_that_waits_for_ever_is_given_up_when_all_others_are_done(
    chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    @ps.program
    async def stuck(s: ps.State, forever: bool) -> str:
        s += ps.user("Wait for it.")
        answer = await s.gen(max_tokens=4)
        if forever:
            await asyncio.Event().wait()
        return answer

    rows = [{"forever": False}, {"forever": True}]
    with closing(SimulatedBackend(setting(), ScriptedAnswers(chat), chat=chat)) as backend:
        ended: list[int] = []
        with pytest.raises(RuntimeError, match="never happens"):
            stuck.map(rows, fleet=backend, progress=False, on_row=lambda row: ended.append(row.index))
        assert ended == [0]
        assert backend.fleet.scheduler.snapshot().num_open_programs == 1
    assert backend.fleet.scheduler.snapshot().num_open_programs == 0
    gc.collect()
    assert caplog.records == []


def test_threads_are_refused(backend: SimulatedBackend) -> None:
    @ps.program
    async def threaded(s: ps.State) -> int:
        return await asyncio.to_thread(int)

    (row,) = threaded.map([{}], fleet=backend, progress=False)
    assert isinstance(row.error, RuntimeError)
    assert "threads cannot run in virtual time: call the function directly" in str(row.error)
