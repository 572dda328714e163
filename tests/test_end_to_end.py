"""The whole path on two real SGLang runtimes: read, place, run, and SGLang's own count of what was reused."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import orjson
import psutil
import pytest
from pydantic import BaseModel, Field

import preble_sgl as ps
from preble_sgl.commands.demo import demo_jobs, explain_jobs, run_jobs
from preble_sgl.core import RequestRecord
from preble_sgl.fleet import Fleet
from preble_sgl.global_sched.prefix_first import MIN_SHARED_LEN
from tests.programs.test_programs import story

pytestmark = pytest.mark.sglang


@pytest.fixture
async def fleet(runtime_urls: tuple[str, str]) -> AsyncIterator[Fleet]:
    """A fleet over the two runtimes, with empty caches."""
    async with Fleet.attach(runtime_urls) as opened:
        await opened.flush_cache()
        yield opened


async def test_the_demo_reuses_what_was_predicted_and_e2_computes_less_than_round_robin(fleet: Fleet) -> None:
    jobs = demo_jobs()
    predicted = await explain_jobs(fleet, jobs)
    e2 = await run_jobs(fleet, jobs, "preble_e2", progress=False)
    await fleet.flush_cache()
    round_robin = await run_jobs(fleet, jobs, "round_robin", progress=False)
    assert e2.usage.cached_tokens == pytest.approx(predicted, rel=0.05)
    assert e2.usage.prompt_tokens == pytest.approx(round_robin.usage.prompt_tokens, rel=0.01)
    assert e2.usage.computed_tokens <= 0.7 * round_robin.usage.computed_tokens
    calls = [sum(record.worker_id == worker for record in e2.records) for worker in fleet.worker_ids]
    assert min(calls) >= 0.3 * sum(calls)


@ps.program
async def chained(s: ps.State, start: str) -> tuple[str, ps.Selection, str]:
    s += ps.system("You continue what you are given. " * 80) + ps.user(start)
    first = await s.gen(max_tokens=20, ignore_eos=True)
    picked = await s.select(["yes", "no", "perhaps not"])
    return first, picked, await s.ask(ps.user("And then?"), max_tokens=5)


async def test_a_chain_reuses_generated_tokens_exactly(fleet: Fleet) -> None:
    records: list[RequestRecord] = []
    first, picked, _ = await chained.arun(fleet.with_policy("preble_e2", on_record=records.append), "Once")
    generated, *scored, last = records
    assert generated.usage.output_tokens == 20
    assert len(first) > 0
    assert picked.value in ("yes", "no", "perhaps not")
    assert len({record.worker_id for record in records}) == 1
    for record in [*scored, last]:  # all but the last token generated has KV
        assert record.usage.cached_tokens >= generated.usage.prompt_tokens + 19


async def test_a_choice_scores_the_same_alone_and_among_others(fleet: Fleet) -> None:
    @ps.program
    async def pick(s: ps.State, choices: list[str]) -> ps.Selection:
        s += ps.user("Pick one.")
        return await s.select(choices)

    together = await pick.arun(fleet, ["left", "right", "up"])
    for choice, score in zip(together.choices, together.scores, strict=True):
        alone = await pick.arun(fleet, [choice])
        assert alone.scores[0] == pytest.approx(score, abs=0.02)


def test_a_program_runs_from_code_that_is_not_async(runtime_urls: tuple[str, str]) -> None:
    with ps.Fleet.attach(runtime_urls) as fleet:
        batch = chained.map([{"start": "Once"}, {"start": "Twice"}], fleet=fleet, progress=False)
        assert len(batch.values) == 2
        assert batch.usage.cached_tokens > 0


def test_run_writes_every_row_and_reports_the_one_that_fails(
    runtime_urls: tuple[str, str], tmp_path: Path
) -> None:
    program, rows, out = tmp_path / "p.py", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    program.write_text(
        "import preble_sgl as ps\n"
        "@ps.program\n"
        "async def p(s, n: int) -> int:\n"
        "    await s.ask(ps.user('number ' * n), max_tokens=2)\n"
        "    return 10 // (n - 2)\n"
    )
    rows.write_text("".join(f'{{"n": {n}}}\n' for n in (1, 2, 3)))
    attach = [option for url in runtime_urls for option in ("--attach", url)]
    kept, learnt = tmp_path / "kept.jsonl", tmp_path / "learnt.sqlite"
    more = ["--checkpoint", str(kept), "--profile", str(learnt), "--seed", "3", "--reorder", "rows"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "preble_sgl.cli",
            "run",
            program,
            "--rows",
            rows,
            "--out",
            out,
            *attach,
            *more,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"preble-sgl: 1 of 3 rows failed: see the errors in {out}"
    lines = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert [line.get("value") for line in lines] == [-10, None, 10]
    assert lines[1]["error"] == {"type": "ZeroDivisionError", "message": "integer division or modulo by zero"}
    assert all(line["usage"]["prompt_tokens"] > 0 for line in lines)
    assert [orjson.loads(line)["row"] for line in kept.read_bytes().splitlines()[1:]] in ([0, 2], [2, 0])
    assert ps.ProgramProfile.load(learnt).output_len("p", "p.py:4") == 2.0
    left = ["kept.jsonl", "learnt.sqlite", "out.jsonl", "p.py", "rows.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_interrupting_a_run_leaves_no_process_and_no_output(tmp_path: Path, tiny_model: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    questions = [f"question {i}?" for i in range(200)]
    rows.write_bytes(orjson.dumps({"document": "word " * 2000, "questions": questions, "max_tokens": 500}))
    command: list[str | Path] = [
        "run",
        "programs/document_qa.py",
        "--rows",
        rows,
        "--out",
        out,
        "--model-path",
        tiny_model,
    ]
    running = subprocess.Popen(
        [sys.executable, "-m", "preble_sgl.cli", *command, "--runtimes", "1"],
        stderr=subprocess.PIPE,
        # A shell starts what runs in its background with interrupts ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    killer = threading.Timer(300, running.kill)
    killer.start()
    part = out.with_name("out.jsonl.part")
    while not part.exists() and running.poll() is None:
        time.sleep(0.1)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    running.communicate()
    killer.cancel()
    assert running.returncode != 0
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert not out.exists()


Digit = Annotated[int, Field(ge=0, le=9)]


class Ended(BaseModel):
    """That there is nothing more to do."""

    well: bool


@ps.tool(max_len=20)
def add(a: Digit, b: Digit) -> int:
    """Add two digits."""
    return a + b


@ps.program
async def constrained(s: ps.State) -> tuple[str, dict[str, int], ps.Turn[Ended], list[str], ps.Selection]:
    s += ps.system("You do as the grammar says.", tools=[add]) + ps.user("Go.")
    word = await s.gen(choices=["left", "right (far)"], max_tokens=20, temperature=1.0)
    s += ps.user("And now?")
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    record = await s.gen(schema, max_tokens=60)
    s += ps.user("Use a tool, or end.")
    turn = await s.act([add], Ended, max_tokens=120, temperature=1.0)
    results = await s.use(turn)
    s += ps.user("Which?")
    return word, record, turn, results, await s.select(["yes", "no"], rule="vs_prior")


async def test_every_grammar_holds_a_real_model_with_random_weights(fleet: Fleet) -> None:
    retry = ps.Retry(attempts=4, backoff_s=0.0, on=(ps.OutputError,))
    batch = await constrained.amap([{}] * 8, fleet=fleet, retry=retry, progress=False)
    plan = await constrained.aplan([{}] * 8, fleet=fleet)
    for word, record, turn, results, pick in batch.values:
        assert word in ("left", "right (far)")
        assert 0 <= record["n"] <= 9
        assert (turn.final is None) == bool(turn.calls)
        if turn.calls:
            (call,) = turn.calls
            assert results == [str(call.arguments["a"] + call.arguments["b"])]
        assert pick.value in ("yes", "no")
    assert sum(result.num_calls for result in batch) in plan.bounds.calls


async def test_events_of_a_real_fleet_add_up_to_the_answers(fleet: Fleet) -> None:
    texts: dict[str, str] = {}
    async for event in chained.astream(fleet, "Once"):
        if isinstance(event, ps.TextDelta):
            texts[event.call] = texts.get(event.call, "") + event.text
        elif isinstance(event, ps.CallEnded) and ":" not in event.call:
            assert texts.pop(event.call, "") == event.text
    assert texts == {}
    assert isinstance(event, ps.RunEnded)


async def test_a_row_over_its_time_is_aborted_on_its_runtime(fleet: Fleet) -> None:
    @ps.program
    async def endless(s: ps.State) -> str:
        return await s.ask(ps.user("Talk."), max_tokens=4000, ignore_eos=True)

    batch = await endless.amap([{}], fleet=fleet, timeout_s=1.0, progress=False)
    assert isinstance(batch[0].error, ps.DeadlineError)
    await fleet.flush_cache()  # succeeds only when nothing runs any more


async def test_a_batch_on_a_real_fleet_resumes_from_its_checkpoint(fleet: Fleet, tmp_path: Path) -> None:
    rows = [{"start": word} for word in ("Once", "Twice", "Never")]
    path = tmp_path / "rows.jsonl"
    first = await chained.amap(rows[:2], fleet=fleet, checkpoint=path, progress=False)
    again = await chained.amap(rows, fleet=fleet, checkpoint=path, progress=False)
    assert [result.is_resumed for result in again] == [True, True, False]
    assert again.values[:2] == first.values


@pytest.mark.parametrize(
    "name", ["few_shot", "document_qa", "knn_prompting", "self_consistency", "multi_turn_chat"]
)
async def test_one_real_runtime_serves_what_was_planned(name: str, runtime_urls: tuple[str, str]) -> None:
    told = story(name)
    async with Fleet.attach(runtime_urls[:1]) as one:
        await one.flush_cache()
        plan = await told.PROGRAM.aplan(told.ROWS, fleet=one)
        batch = await told.PROGRAM.amap(told.ROWS, fleet=one, plan=plan, progress=False)
    assert batch.errors == []
    num_calls = sum(result.num_calls for result in batch)
    assert num_calls == plan.bounds.calls.lower
    # Calls that come together wait for the first to compute what they share, unless it is very little.
    least = plan.bounds.reusable_tokens.lower - num_calls * MIN_SHARED_LEN
    assert least <= batch.usage.cached_tokens <= plan.bounds.reusable_tokens.upper
    if name != "multi_turn_chat":  # there lengths of answers are in the prompts
        assert batch.usage.prompt_tokens == plan.prompt_tokens
