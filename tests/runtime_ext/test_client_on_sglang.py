"""What real SGLang does with our requests."""

import asyncio
import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import aiohttp
import pytest
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from preble_sgl.core import Chunk, Request, Usage
from preble_sgl.errors import RequestRejected
from preble_sgl.runtime_ext.client import SglangRuntime
from tests.runtime_ext.requests import output_ids, request, run, text

pytestmark = pytest.mark.sglang

Runtimes = tuple[SglangRuntime, SglangRuntime]
PROMPT = list(range(300, 360))


class Answer(StrEnum):
    YES = "yes"
    NO = "no"


class Verdict(BaseModel):
    """The kind of schema that a judging program asks for."""

    score: int = Field(ge=1, le=5)
    answer: Answer
    reason: str = Field(max_length=40)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


async def raw_generate(runtime: SglangRuntime, **body: object) -> dict[str, object]:
    """Ask the server directly, without streaming and without our client."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{runtime.info.url}/generate", json=body) as response,
    ):
        answer: dict[str, object] = await response.json()
        return answer


async def wait_idle(runtime: SglangRuntime) -> None:
    async with asyncio.timeout(30):
        while (await runtime.loads()).num_running:
            await asyncio.sleep(0.02)


async def test_a_runtime_says_what_it_is(
    runtimes: Runtimes, runtime_urls: tuple[str, str], tiny_model: Path
) -> None:
    info = runtimes[0].info
    assert (info.worker_id, info.url, info.model_path) == ("w0", runtime_urls[0], str(tiny_model))
    assert (info.version, info.kv_tokens, info.page_size) == ("0.5.23", 65536, 1)
    assert await runtimes[0].ready()


async def test_the_chunks_add_up_to_what_the_server_answers_in_one_piece(
    runtimes: Runtimes, tokenizer: Tokenizer
) -> None:
    chunks = await run(runtimes[0], request(PROMPT, max_new_tokens=24))
    whole = await raw_generate(
        runtimes[0], input_ids=PROMPT, sampling_params={"max_new_tokens": 24, "temperature": 0}
    )
    assert len(chunks) > 1
    assert (output_ids(chunks), text(chunks)) == (whole["output_ids"], whole["text"])
    assert text(chunks) == tokenizer.decode(output_ids(chunks))


async def test_only_the_last_chunk_has_reason_and_usage(runtimes: Runtimes) -> None:
    *earlier, last = await run(runtimes[0], request(PROMPT, max_new_tokens=3))
    assert {(chunk.finish_reason, chunk.usage) for chunk in earlier} == {(None, Usage())}
    assert (last.finish_reason, last.usage) == ("length", Usage(60, 0, 3))


async def test_all_but_the_last_token_of_a_known_prompt_come_from_the_cache(runtimes: Runtimes) -> None:
    await run(runtimes[0], request(PROMPT, max_new_tokens=1))
    again = await run(runtimes[0], request(PROMPT, max_new_tokens=1))
    elsewhere = await run(runtimes[1], request(PROMPT, max_new_tokens=1))
    assert (again[-1].usage.cached_tokens, elsewhere[-1].usage.cached_tokens) == (59, 0)


async def test_the_cache_holds_generated_tokens_too(runtimes: Runtimes) -> None:
    first = output_ids(await run(runtimes[0], request(PROMPT, max_new_tokens=10)))
    longer = await run(runtimes[0], request([*PROMPT, *first, 400], max_new_tokens=1))
    assert longer[-1].usage.cached_tokens == 69  # the last generated token was never an input


async def test_zero_new_tokens_fill_the_cache_and_answer_nothing(runtimes: Runtimes) -> None:
    (only,) = await run(runtimes[0], request(PROMPT, max_new_tokens=0))
    assert (list(only.output_ids), only.text, only.finish_reason) == ([], "", "length")
    assert (await run(runtimes[0], request(PROMPT, max_new_tokens=1)))[-1].usage.cached_tokens == 59


async def test_flushing_forgets_and_namespaces_keep_apart(runtimes: Runtimes) -> None:
    await run(runtimes[0], request(PROMPT, max_new_tokens=0, namespace="a"))
    other = await run(runtimes[0], request(PROMPT, max_new_tokens=0, namespace="b"))
    same = await run(runtimes[0], request(PROMPT, max_new_tokens=0, namespace="a"))
    await runtimes[0].flush_cache()
    flushed = await run(runtimes[0], request(PROMPT, max_new_tokens=0, namespace="a"))
    assert [chunks[-1].usage.cached_tokens for chunks in (other, same, flushed)] == [0, 59, 0]


async def test_scores_are_the_log_probabilities_of_the_tail(runtimes: Runtimes) -> None:
    raw = await raw_generate(
        runtimes[1],
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 6, "temperature": 0},
        return_logprob=True,
    )
    meta = raw["meta_info"]
    assert isinstance(meta, dict)
    generated = [(entry[1], entry[0]) for entry in meta["output_token_logprobs"]]
    prompt = [*PROMPT, *(token for token, _ in generated)]
    for cached_tokens in (0, 59):
        (chunk,) = await run(runtimes[0], request(prompt, score_from=60, max_new_tokens=0))
        assert chunk.logprobs == pytest.approx([value for _, value in generated], abs=1e-3)
        assert chunk.usage.cached_tokens == cached_tokens


async def test_output_ids_include_what_ended_the_output_and_the_text_does_not(
    runtimes: Runtimes, tokenizer: Tokenizer
) -> None:
    free = await run(runtimes[0], request(PROMPT, max_new_tokens=8))
    ids, fourth = output_ids(free), tokenizer.decode([output_ids(free)[3]])
    by_token = await run(runtimes[0], request(PROMPT, max_new_tokens=8, stop_token_ids=(ids[3],)))
    by_text = await run(runtimes[0], request(PROMPT, max_new_tokens=8, stop=(fourth,)))
    for chunks in (by_token, by_text):
        assert (output_ids(chunks), text(chunks)) == (ids[:4], tokenizer.decode(ids[:3]))
        assert chunks[-1].finish_reason == "stop"
    constrained = await run(runtimes[0], request(PROMPT, regex="(yes|no)"))
    assert output_ids(constrained)[-1] == tokenizer.token_to_id("<|im_end|>")
    assert text(constrained) in ("yes", "no")


async def test_a_schema_with_bounds_enums_and_lengths_is_kept(runtimes: Runtimes) -> None:
    schema = json.dumps(Verdict.model_json_schema())
    for start in range(5):
        wanted = request(PROMPT[start:], max_new_tokens=128, json_schema=schema)
        Verdict.model_validate_json(text(await run(runtimes[0], wanted)))


async def test_three_hundred_requests_run_at_once(runtimes: Runtimes) -> None:
    wanted = [request([*PROMPT, 400 + index], max_new_tokens=2) for index in range(300)]
    answers = await asyncio.gather(*(run(runtimes[index % 2], one) for index, one in enumerate(wanted)))
    assert [answer[-1].usage.output_tokens for answer in answers] == [2] * 300


async def test_closing_the_iterator_aborts_the_request(runtimes: Runtimes) -> None:
    answer = runtimes[0].stream(request(PROMPT, max_new_tokens=30000))
    await anext(answer)
    assert (await runtimes[0].loads()).num_running == 1
    await answer.aclose()
    await wait_idle(runtimes[0])


async def test_cancelling_the_task_aborts_the_request(runtimes: Runtimes) -> None:
    task = asyncio.create_task(run(runtimes[0], request(PROMPT, max_new_tokens=30000)))
    async with asyncio.timeout(30):
        while not (await runtimes[0].loads()).num_running:
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_idle(runtimes[0])


async def test_a_request_cancelled_at_once_leaves_nothing_running(runtimes: Runtimes) -> None:
    tasks = [asyncio.create_task(run(runtimes[0], request(PROMPT, max_new_tokens=30000))) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await wait_idle(runtimes[0])


async def test_an_abort_by_somebody_else_ends_the_answer(runtimes: Runtimes) -> None:
    wanted = request(PROMPT, max_new_tokens=30000)
    answer = runtimes[0].stream(wanted)
    await anext(answer)
    async with aiohttp.ClientSession(runtimes[0].info.url) as session:
        await session.post("/abort_request", json={"rid": wanted.request_id})
    *_, last = [chunk async for chunk in answer]
    assert last.finish_reason == "abort"


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (request([5] * 40000), "longer than the model's context length"),
        (request(PROMPT, max_new_tokens=40000), "exceeds the model's maximum context length"),
        (request(PROMPT, regex="((("), "Failed to compile regex grammar"),
        (request(PROMPT, json_schema='{"type": "nonsense"}'), "Failed to compile json grammar"),
        (request([4096]), "outside the vocabulary of 4096"),
        (request([-1]), "outside the vocabulary of 4096"),
    ],
)
async def test_what_the_server_cannot_do_is_rejected_and_the_server_lives(
    runtimes: Runtimes, wanted: Request, complaint: str
) -> None:
    with pytest.raises(RequestRejected, match=complaint) as caught:
        await run(runtimes[0], wanted)
    assert (caught.value.request_id, caught.value.call_path) == (wanted.request_id, "program/gen")
    assert (await run(runtimes[0], request(PROMPT, max_new_tokens=1)))[-1].finish_reason == "length"


async def test_logprobs_of_generated_tokens_come_with_the_answer_and_limit_no_reuse(
    runtimes: Runtimes,
) -> None:
    async def once() -> Chunk:
        asked = replace(request(PROMPT, max_new_tokens=6, ignore_eos=True), num_top_logprobs=3)
        chunks = await run(runtimes[0], asked)
        assert [entry.token_id for entry in chunks[-1].output_logprobs] == output_ids(chunks)
        return chunks[-1]

    first, again = await once(), await once()
    assert again.usage.cached_tokens == len(PROMPT) - 1
    assert len(first.output_logprobs) == 6
    for entry in first.output_logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert all(logprob <= 0 for _, logprob in entry.top)
