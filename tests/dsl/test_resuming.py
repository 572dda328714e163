"""A batch that is killed goes on: every row is there exactly once."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest

import preble_sgl as ps
from preble_sgl.core import Usage
from tests.dsl.killed_batch import run

NUM_ROWS = 300
PAUSE_S = 0.003


def test_a_batch_killed_at_twenty_random_moments_ends_with_every_row_exactly_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        arguments = (str(checkpoint), str(NUM_ROWS), str(PAUSE_S))
        batch = subprocess.Popen([sys.executable, "-m", "tests.dsl.killed_batch", *arguments])
        before = _size(checkpoint)
        while batch.poll() is None and _size(checkpoint) <= before:
            time.sleep(0.005)  # until it has begun to write
        time.sleep(rng.uniform(0, 0.04))
        if batch.poll() is None:
            batch.kill()
            kills += 1
        else:
            assert batch.returncode == 0
            checkpoint.unlink()  # it was quicker than we: another batch
        batch.wait()
        _require_no_row_twice(checkpoint)
    assert run(str(checkpoint), NUM_ROWS, PAUSE_S) == [i * i for i in range(NUM_ROWS)]
    _require_no_row_twice(checkpoint)
    rows = [orjson.loads(line)["row"] for line in checkpoint.read_bytes().splitlines()[1:]]
    assert sorted(rows) == list(range(NUM_ROWS))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_no_row_twice(checkpoint: Path) -> None:
    if checkpoint.exists():
        lines = checkpoint.read_bytes().split(b"\n")[1:-1]  # a last line without its end is torn
        rows = Counter(orjson.loads(line)["row"] for line in lines)
        assert max(rows.values(), default=1) == 1


async def test_rows_that_are_done_are_not_run_again_and_failed_ones_are(tmp_path: Path) -> None:
    backend = ps.ScriptedBackend({"*": "fine"})
    is_mended = False

    @ps.program
    async def picky(s: ps.State, word: str) -> str:
        if word == "bad" and not is_mended:
            raise ZeroDivisionError("on purpose")
        return await s.ask(ps.user(word))

    rows = [{"word": "a"}, {"word": "bad"}, {"word": "c"}]
    checkpoint = tmp_path / "rows.jsonl"
    first = await picky.amap(rows, fleet=backend, checkpoint=checkpoint, progress=False)
    assert [result.ok for result in first] == [True, False, True]
    is_mended = True
    again = await picky.amap([*rows, {"word": "new"}], fleet=backend, checkpoint=checkpoint, progress=False)
    assert again.values == ["fine"] * 4
    assert [result.is_resumed for result in again] == [True, False, True, False]
    assert again.usage == sum((done.usage for done in backend.completions), Usage())
    assert len(backend.requests) == 4


async def test_a_value_that_cannot_be_kept_fails_its_row_and_not_the_batch(tmp_path: Path) -> None:
    @ps.program
    async def odd(s: ps.State, i: int):  # type: ignore[no-untyped-def]
        return object() if i == 1 else i

    rows = [{"i": i} for i in range(3)]
    backend = ps.ScriptedBackend({})
    batch = await odd.amap(rows, fleet=backend, checkpoint=tmp_path / "rows.jsonl", progress=False)
    assert [result.ok for result in batch] == [True, False, True]
    assert "row 1" in str(batch[1].error)


async def test_what_a_listener_raises_ends_the_batch_as_itself() -> None:
    @ps.program
    async def quick(s: ps.State) -> None:
        return None

    def fail(result: object) -> None:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        await quick.amap([{}, {}], fleet=ps.ScriptedBackend({}), on_row=fail, progress=False)
