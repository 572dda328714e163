"""Many rows: errors are data, order is kept."""

import asyncio

import pytest

import preble_sgl as ps
from preble_sgl.core import Usage
from tests.fakes import FakeBackend


@ps.program
async def shout(s: ps.State, word: str, times: int = 1) -> str:
    if word == "bad":
        raise ZeroDivisionError("on purpose")
    return (await s.ask(ps.user(word))) * times


async def test_a_row_that_raises_is_reported_and_the_others_finish(backend: FakeBackend) -> None:
    rows: list[dict[str, object]] = [{"word": "a"}, {"word": "bad"}, {"word": "c", "times": 2}]
    batch = await shout.amap(rows, fleet=backend, progress=False)
    assert [result.ok for result in batch] == [True, False, True]
    assert [result.value for result in batch] == ["fine", None, "finefine"]
    assert [result.index for result in batch.errors] == [1]
    assert [result.num_calls for result in batch] == [1, 0, 1]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        _ = batch.values


async def test_usage_adds_up_over_rows(backend: FakeBackend) -> None:
    batch = await shout.amap([{"word": "a"}, {"word": "b"}], fleet=backend, progress=False)
    assert batch.usage == sum((result.usage for result in batch), Usage())
    assert batch.usage.prompt_tokens == sum(len(request.prompt) for request in backend.requests)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"times": 2}, r"row 1: missing a required argument: 'word'; shout\(word: str, times: int = 1\)"),
        ({"word": "a", "tims": 2}, r"row 1: got an unexpected keyword argument 'tims'"),
    ],
)
async def test_a_row_that_does_not_fit_is_named_before_anything_runs(
    backend: FakeBackend, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ps.InputError, match=message):
        await shout.amap([{"word": "a"}, row], fleet=backend, progress=False)
    assert backend.requests == []


async def test_at_most_so_many_rows_are_under_way(backend: FakeBackend) -> None:
    running, most = 0, 0

    @ps.program
    async def counted(s: ps.State, i: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await counted.amap([{"i": i} for i in range(9)], fleet=backend, concurrency=3, progress=False)
    assert most == 3


async def test_rows_are_told_of_as_they_finish(backend: FakeBackend) -> None:
    seen: list[int] = []
    rows = [{"word": "a"}, {"word": "bad"}]
    await shout.amap(rows, fleet=backend, progress=False, on_row=lambda result: seen.append(result.index))
    assert sorted(seen) == [0, 1]


async def test_the_progress_bar_counts_rows_and_calls(
    backend: FakeBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    await shout.amap([{"word": "a"}, {"word": "b"}], fleet=backend)
    shown = capsys.readouterr().err
    assert "shout" in shown
    assert "2/2 rows" in shown
    assert "2 calls" in shown


async def test_the_backend_learns_when_each_run_begins_and_ends(backend: FakeBackend) -> None:
    rows = [{"word": "a"}, {"word": "bad"}]
    plan = await shout.aplan(rows[:1], fleet=backend)
    await shout.amap(rows[:1], fleet=backend, plan=plan, progress=False)
    (hint,) = backend.hints
    assert hint.kv_tokens == plan.hint(0, hint.program_id).kv_tokens
    assert backend.ended == [backend.requests[0].program_id] == [hint.program_id]
    await shout.amap(rows, fleet=backend, progress=False)
    assert [hint.kv_tokens for hint in backend.hints[1:]] == [None, None]
    assert sorted(backend.ended) == sorted(hint.program_id for hint in backend.hints)


async def test_a_plan_of_other_rows_is_refused(backend: FakeBackend) -> None:
    plan = await shout.aplan([{"word": "a"}], fleet=backend)
    with pytest.raises(ps.InputError, match="the plan is of 1 rows, but there are 2"):
        await shout.amap([{"word": "a"}, {"word": "b"}], fleet=backend, plan=plan, progress=False)
