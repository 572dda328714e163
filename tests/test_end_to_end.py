"""The whole path on two real SGLang runtimes: read, place, run, and SGLang's own count of what was reused."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import psutil
import pytest

import preble_sgl as ps
from preble_sgl.commands.demo import demo_jobs, explain_jobs, run_jobs
from preble_sgl.core import RequestRecord
from preble_sgl.fleet import Fleet

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
    done = subprocess.run(
        [sys.executable, "-m", "preble_sgl.cli", "run", program, "--rows", rows, "--out", out, *attach],
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.py", "rows.jsonl"]


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
        [sys.executable, "-m", "preble_sgl.cli", *command, "--runtimes", "1"], stderr=subprocess.PIPE
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
