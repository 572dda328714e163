"""Our own client and fleet use an emulated runtime as they use SGLang."""

import asyncio
from pathlib import Path

import pytest

import preble_sgl as ps
from preble_sgl.core import RequestRecord, Usage
from preble_sgl.errors import RequestRejected
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.client import SglangRuntime
from tests.runtime_ext.emulated.runtimes import config, running
from tests.runtime_ext.requests import output_ids, request, run, text

PROMPT = list(range(100, 160))


@pytest.mark.parametrize("incremental", [False, True])
async def test_the_client_streams_what_the_server_answers_in_one_piece(incremental: bool) -> None:
    async with running(config(incremental=incremental)) as emulated:
        whole = await emulated.generate(*PROMPT, max_new_tokens=12)
        async with SglangRuntime.attach(emulated.url) as runtime:
            chunks = await run(runtime, request(PROMPT, max_new_tokens=12))
            await runtime.flush_cache()
            (warm,) = await run(runtime, request(PROMPT, max_new_tokens=0))
            assert await runtime.ready()
            load = await runtime.loads()
    assert (output_ids(chunks), text(chunks)) == (whole["output_ids"], whole["text"])
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("length", Usage(60, 59, 12))
    assert (warm.text, warm.usage) == ("", Usage(60, 0, 0))
    assert (load.num_running, load.num_waiting, load.kv_tokens, load.prefilled_tokens) == (0, 0, 2000, 121)


async def test_the_client_reads_what_the_runtime_is() -> None:
    async with running() as emulated, SglangRuntime.attach(emulated.url) as runtime:
        info = runtime.info
    assert (info.model_path, info.version, info.device) == ("emulated/test", "0.5.23", "cuda")
    assert (info.kv_tokens, info.page_size, info.max_input_len) == (2000, 1, 1998)


async def test_closing_a_stream_aborts_it() -> None:
    async with running(config(0.002)) as emulated, SglangRuntime.attach(emulated.url) as runtime:
        stream = runtime.stream(request(PROMPT, max_new_tokens=1500))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(10):
            while (await runtime.loads()).num_running:
                await asyncio.sleep(0.01)


async def test_what_it_cannot_do_is_a_rejection() -> None:
    async with running() as emulated, SglangRuntime.attach(emulated.url) as runtime:
        with pytest.raises(RequestRejected, match="return_logprob: an emulated runtime has no model"):
            await run(runtime, request(PROMPT, score_from=30, max_new_tokens=0))
        with pytest.raises(RequestRejected, match="3000 tokens"):
            await run(runtime, request(range(3000)))


@ps.program
async def chained(s: ps.State, start: str) -> tuple[str, str]:
    s += ps.system("You continue what you are given. " * 20) + ps.user(start)
    first = await s.gen(max_tokens=20)
    return first, await s.ask(ps.user("And then?"), max_tokens=5)


@pytest.mark.parametrize("with_model", [False, True])
async def test_a_fleet_runs_programs_on_emulated_runtimes(tiny_model: Path, with_model: bool) -> None:
    settings = config(model_path=str(tiny_model) if with_model else None)
    records: list[RequestRecord] = []
    async with (
        running(settings) as one,
        running(settings) as other,
        Fleet.attach([one.url, other.url], model_path=tiny_model) as fleet,
    ):
        placed = fleet.with_policy("preble_e2", on_record=records.append)
        first, second = await chained.arun(placed, "Once")
    assert (len(first.split()), len(second.split())) == (20, 5)
    assert len({record.worker_id for record in records}) == 1
    assert records[1].usage.cached_tokens == records[0].usage.prompt_tokens + 19
