"""`preble-sgl run` from outside: its workers are listed and drained, and SIGTERM ends it between rows."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from preble_sgl.runtime_ext.client import SglangRuntime

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).parents[1]
NUM_ROWS = 60


def command(folder: Path, urls: tuple[str, str]) -> list[str]:
    rows = folder / "rows.jsonl"
    question = {"document": "A short text about rivers. " * 20, "questions": ["What is it about?"]}
    rows.write_text(
        "".join(json.dumps(question | {"questions": [f"Why {i}?"]}) + "\n" for i in range(NUM_ROWS))
    )
    return [
        *(sys.executable, "-m", "preble_sgl.cli", "run", "programs/document_qa.py"),
        *(
            "--rows",
            str(rows),
            "--out",
            str(folder / "out.jsonl"),
            "--checkpoint",
            str(folder / "done.jsonl"),
        ),
        *("--attach", urls[0], "--attach", urls[1], "--concurrency", "2"),
    ]


async def start(*arguments: str, folder: Path) -> Process:
    environment = {"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"}  # a directory of sockets of its own
    return await asyncio.create_subprocess_exec(
        *arguments, cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE
    )


async def finished(process: Process) -> tuple[int | None, str, str]:
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def wait_rows(folder: Path, num_rows: int) -> None:
    part = folder / "out.jsonl.part"
    while not part.exists() or len(part.read_text().splitlines()) < num_rows:
        await asyncio.sleep(0.05)


async def test_sigterm_lets_rows_that_began_end_and_the_checkpoint_goes_on_from_there(
    runtime_urls: tuple[str, str], tmp_path: Path
) -> None:
    running = await start(*command(tmp_path, runtime_urls), folder=tmp_path)
    await wait_rows(tmp_path, 3)
    running.send_signal(signal.SIGTERM)
    status, _, err = await finished(running)
    assert status == 143, err
    assert "ended early, as told" in err
    assert not (tmp_path / "out.jsonl").exists()
    num_done = sum('"value"' in line for line in (tmp_path / "out.jsonl.part").read_text().splitlines())
    assert 3 <= num_done < NUM_ROWS
    status, _, err = await finished(await start(*command(tmp_path, runtime_urls), folder=tmp_path))
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(NUM_ROWS))
    assert all("value" in line for line in lines)


async def test_a_worker_of_a_running_batch_is_listed_and_drained_from_another_process(
    runtime_urls: tuple[str, str], tmp_path: Path
) -> None:
    running = await start(*command(tmp_path, runtime_urls), folder=tmp_path)
    await wait_rows(tmp_path, 1)
    cli = (sys.executable, "-m", "preble_sgl.cli")
    status, out, err = await finished(await start(*cli, "workers", folder=tmp_path))
    assert status == 0, err
    worker = runtime_urls[0].removeprefix("http://")
    assert worker in out
    status, out, err = await finished(await start(*cli, "drain", worker, folder=tmp_path))
    assert (status, out) == (0, f"{worker} is drained\n"), err
    status, out, err = await finished(await start(*cli, "workers", folder=tmp_path))
    assert status == 0, err
    assert worker not in out
    assert (await finished(running))[0] == 0
    async with SglangRuntime.attach(runtime_urls[0]) as runtime:
        assert await runtime.ready()  # it is not ours, and goes on
