"""Requests that wait together: on a real runtime that runs one at a time, and on the engine model."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import aiohttp
import orjson

from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, token_ids
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.plugin.hints import CallHint
from preble_sgl.runtime_ext.wire import generate_body
from preble_sgl.sim.wait_queue import WaitOrder
from tests.runtime_ext.requests import request
from tests.sim.engines import engine, run

NUM_WAITING = 24
KV_TOKENS = 16384


def documents() -> list[list[int]]:
    """Return prompts that are cached before the queue forms."""
    rng = random.Random(1)
    return [[rng.randrange(10, 2000) for _ in range(length)] for length in (60, 200, 400)]


def served_before() -> list[Request]:
    """Return requests of three programs, of which the second and the third were served much and very much."""
    lens = {"little": 40, "much": 700, "very_much": 2500}
    rng = random.Random(2)
    return [
        _request(program, [rng.randrange(10, 2000) for _ in range(length)], 1)
        for program, length in lens.items()
    ]


def waiting() -> list[Request]:
    """Return requests with cached beginnings of all lengths, of several programs, with all kinds of hopes."""
    rng = random.Random(3)
    programs = ["little", "much", "very_much", *(f"new{number}" for number in range(4))]
    requests = []
    for _ in range(NUM_WAITING):
        begin = rng.choice(documents())
        own = [rng.randrange(10, 2000) for _ in range(rng.randrange(20, 900))]
        prompt = begin[: rng.randrange(len(begin) + 1)] + own
        expected = rng.choice([None, rng.randrange(1, 300)])
        one = _request(rng.choice(programs), prompt, 1)
        requests.append(replace(one, expected_output_len=expected))
    return requests


async def order_on_runtime(runtime: SglangRuntime) -> list[RequestId]:
    """Let them wait behind a long request on a runtime that runs one at a time; return who ran, in order."""
    for prompt in documents():
        await runtime.warm(token_ids(prompt))
    for one in served_before():
        await _prefilled_at(runtime, one)
    blocker = asyncio.create_task(_drain(runtime))
    await _wait_load(runtime, num_running=1, num_waiting=0)
    answers = []
    for number, one in enumerate(waiting(), start=1):
        answers.append(asyncio.create_task(_prefilled_at(runtime, one)))
        await _wait_load(runtime, num_running=1, num_waiting=number)
    blocker.cancel()
    return [request_id for _, request_id in sorted(await asyncio.gather(*answers))]


def order_in_model(order: WaitOrder) -> list[RequestId]:
    """Return who runs on the engine model, in order."""
    one = engine(order=order, max_running=1, kv_tokens=KV_TOKENS, chunk_tokens=None)
    for number, prompt in enumerate(documents()):
        one.submit(_request(f"document{number}", prompt, 0), token_ids(), 0.0)
        run(one)
    for earlier in served_before():
        one.submit(earlier, token_ids([5]), 0.0)
        run(one)
    for request_ in waiting():
        one.submit(request_, token_ids([5]), 0.0)
    return [finished.request_id for finished in run(one)]


def _request(program: str, prompt: Sequence[int], max_new_tokens: int) -> Request:
    key = random.Random(str((program, list(prompt)))).randrange(1 << 60)
    return Request(
        request_id=RequestId(f"{key:032x}"),
        program_id=ProgramId(program),
        call_path="queued",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True),
    )


async def _drain(runtime: SglangRuntime) -> None:
    async for _ in runtime.stream(request([7, 8, 9], max_new_tokens=4000, ignore_eos=True)):
        pass


async def _prefilled_at(runtime: SglangRuntime, one: Request) -> tuple[float, RequestId]:
    """Run a request; return when its prompt was computed by the runtime's clock, and its id."""
    hints = [CallHint(one.program_id, one.expected_output_len)]
    body = orjson.loads(generate_body(one, with_priority=False, hints=hints)) | {"stream": False}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{runtime.info.url}/generate", json=body) as response,
    ):
        answer = await response.json()
    return answer["meta_info"]["prefill_finished_time"], one.request_id


async def _wait_load(runtime: SglangRuntime, *, num_running: int, num_waiting: int) -> None:
    while (load := await runtime.loads()).num_running != num_running or load.num_waiting < num_waiting:
        await asyncio.sleep(0.02)
