"""Batches that save work: equal calls once, rows and fields in an order that shares, rows at a time."""

import asyncio
from itertools import pairwise

import polars
import pytest

import preble_sgl as ps
from preble_sgl.core import Usage, common_prefix_len
from preble_sgl.dsl.batch import Reorder
from preble_sgl.dsl.concurrency import AdaptiveLimit, RowLimit


@ps.program
async def ask(s: ps.State, text: str, temperature: float = 0.0) -> str:
    return await s.ask(ps.user(text), temperature=temperature)


async def test_equal_greedy_calls_are_made_once_and_counted_apart() -> None:
    backend = ps.ScriptedBackend({"*": "fine"})
    rows = [{"text": text} for text in ("a", "b", "a", "a")]
    batch = await ask.amap(rows, fleet=backend, output_cache=True, progress=False)
    assert batch.values == ["fine"] * 4
    assert len(backend.requests) == 2
    assert batch.num_duplicates == 2
    assert batch.usage == sum((done.usage for done in backend.completions), Usage())


async def test_sampled_calls_are_each_made() -> None:
    backend = ps.ScriptedBackend({"*": "fine"})
    rows = [{"text": "a", "temperature": 1.0}] * 3
    batch = await ask.amap(rows, fleet=backend, output_cache=True, progress=False)
    assert (len(backend.requests), batch.num_duplicates) == (3, 0)


async def test_an_equal_call_does_not_fail_with_the_one_before_it() -> None:
    answers = iter([ps.RequestRejected("full"), "fine", "more"])

    def script(request: object, prompt: str) -> object:
        return next(answers)

    backend = ps.ScriptedBackend(script)
    batch = await ask.amap([{"text": "a"}] * 3, fleet=backend, output_cache=True, progress=False)
    assert [result.value for result in batch] == [None, "fine", "fine"]
    assert len(backend.requests) == 2


REVIEWS = [
    {"product": f"{'A' if i % 2 else 'B'} long description of a product " * 3, "review": f"review {i}"}
    for i in range(6)
]


@ps.program
async def judge(s: ps.State, product: str, review: str) -> str:
    s += ps.system("Is it good?")
    return await s.ask(ps.user(ps.fields(review=review, product=product)))


def _neighbours_share(backend: ps.ScriptedBackend) -> int:
    prompts = [request.prompt.tobytes() for request in backend.requests]
    return sum(common_prefix_len(a, b) for a, b in pairwise(prompts))


async def test_rows_run_in_the_order_that_shares_and_come_back_in_theirs() -> None:
    @ps.program
    async def plain(s: ps.State, product: str, review: str) -> str:
        return await s.ask(ps.user(product + review))

    shared = {}
    orders: tuple[Reorder | None, ...] = (None, "rows")
    for reorder in orders:
        backend = ps.ScriptedBackend({"*": lambda prompt: prompt[-9:].strip("\x02\x03")})
        batch = await plain.amap(
            REVIEWS,
            fleet=backend,
            reorder=reorder,
            concurrency=1,
            progress=False,
        )
        shared[reorder] = _neighbours_share(backend)
        assert [result.index for result in batch] == list(range(6))
    assert shared["rows"] > 2 * shared[None]


async def test_fields_change_places_so_that_rows_share_them_and_the_plan_knows() -> None:
    usage = {}
    orders: tuple[Reorder | None, ...] = (None, "fields")
    for reorder in orders:
        backend = ps.ScriptedBackend({"*": "yes"})
        plan = await judge.aplan(REVIEWS, fleet=backend, reorder=reorder)
        batch = await judge.amap(REVIEWS, fleet=backend, plan=plan, progress=False)
        assert plan.diff(batch).is_within
        usage[reorder] = batch.usage
        assert usage[reorder].cached_tokens == plan.reusable_tokens
    assert usage["fields"].prompt_tokens == usage[None].prompt_tokens
    assert usage["fields"].computed_tokens < 0.5 * usage[None].computed_tokens


async def test_a_reorder_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ps.InputError, match='give "rows" or "fields"'):
        await judge.aplan(REVIEWS, fleet=ps.ScriptedBackend({}), reorder="columns")  # type: ignore[arg-type]


async def test_a_table_comes_in_and_goes_out() -> None:
    table = polars.DataFrame({"text": ["a", "b"], "temperature": [0.0, -1.0]})
    batch = await ask.amap(table, fleet=ps.ScriptedBackend({"*": "fine"}), progress=False)
    done = batch.table()
    assert isinstance(done, polars.DataFrame)
    assert done["value"].to_list() == ["fine", None]
    assert done["error"].to_list() == [None, "ValueError: temperature=-1.0: must be 0 (greedy) or more"]
    plain = await ask.amap([{"text": "a"}], fleet=ps.ScriptedBackend({"*": "fine"}), progress=False)
    with pytest.raises(ps.InputError, match="were no table"):
        plain.table()


def test_the_limit_climbs_while_tokens_per_second_rise_and_then_stays() -> None:
    limit = AdaptiveLimit(now=0.0, start=2, most=64)
    now = 0.0
    seen = []
    for rate in (100, 200, 400, 400, 400):  # tokens per second that the backend serves
        for _ in range(limit.limit):
            now += 100 / rate
            limit.on_row(100, now)
        seen.append(limit.limit)
    assert seen == [4, 8, 16, 16, 16]


def test_a_full_backend_halves_the_limit_for_good() -> None:
    limit = AdaptiveLimit(now=0.0, start=8)
    limit.on_overload()
    for i in range(8):
        limit.on_row(10_000, float(i + 1))
    assert limit.limit == 4


async def test_a_row_that_is_cancelled_while_it_waits_frees_its_place() -> None:
    limit = RowLimit(1)
    await limit.__aenter__()
    waiting = asyncio.create_task(limit.__aenter__())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await limit.__aexit__()
    await asyncio.wait_for(limit.__aenter__(), 1)
