"""Programs against OpenAI-compatible servers: SGLang's own API, and a scripted one that fails."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from pydantic import BaseModel, Field

import preble_sgl as ps
from preble_sgl.openai_backend import Mode, OpenAIBackend


class Point(BaseModel):
    x: int = Field(ge=0, le=9)


@ps.program
async def describe(s: ps.State, text: str) -> tuple[list[str], Point]:
    s += ps.system("You describe what you are given. " * 20) + ps.user(text)
    notes = await s.map(
        ["colour", "shape"], lambda b, what: b.ask(ps.user(what), max_tokens=6, ignore_eos=True)
    )
    return notes, await s.ask(ps.user("Where is it?"), Point, max_tokens=40)


@pytest.mark.sglang
@pytest.mark.parametrize("mode", ["chat", "completions"])
async def test_a_program_runs_on_a_real_server_in_both_modes(
    mode: Mode, runtime_urls: tuple[str, str], tiny_model: Path
) -> None:
    async with OpenAIBackend.connect(f"{runtime_urls[0]}/v1", model_path=tiny_model, mode=mode) as backend:
        batch = await describe.amap([{"text": "a ball"}, {"text": "a box"}], fleet=backend, progress=False)
        for notes, point in batch.values:
            assert len(notes) == 2
            assert 0 <= point.x <= 9
        plan = await describe.aplan([{"text": "a ball"}, {"text": "a box"}], fleet=backend)
        assert plan.bounds.calls.lower == sum(result.num_calls for result in batch) == 6
        assert batch.usage.output_tokens >= 24
        assert batch.usage.prompt_tokens in plan.bounds.prompt_tokens


@pytest.mark.sglang
async def test_streamed_text_and_logprobs_are_those_of_the_answer(
    runtime_urls: tuple[str, str], tiny_model: Path
) -> None:
    @ps.program
    async def says(s: ps.State) -> ps.Generation[str]:
        s += ps.user("Say something.")
        return await s.generate(max_tokens=12, ignore_eos=True, logprobs=2)

    async with OpenAIBackend.connect(f"{runtime_urls[0]}/v1", model_path=tiny_model) as backend:
        events = [event async for event in says.astream(backend)]
    done = events[-1]
    assert isinstance(done, ps.RunEnded)
    assert "".join(event.text for event in events if isinstance(event, ps.TextDelta)) == done.value.text
    assert done.value.finish_reason == "length"
    assert len(done.value.logprobs) == 12
    assert all(entry.logprob <= 0 and entry.top for entry in done.value.logprobs)


@pytest.mark.sglang
def test_a_server_is_used_from_code_that_is_not_async_and_without_a_tokenizer(
    runtime_urls: tuple[str, str],
) -> None:
    with OpenAIBackend.connect(f"{runtime_urls[0]}/v1") as backend:
        notes, point = describe.run(backend, "a ball")
        assert len(notes) == 2
        assert isinstance(point, Point)
        with pytest.raises(ps.RequestRejected, match="cannot score choices"):
            pick.run(backend)


@ps.program
async def pick(s: ps.State) -> str:
    s += ps.user("Left or right?")
    return (await s.select(["left", "right"])).value


@pytest.mark.sglang
async def test_what_a_real_server_refuses_says_why(runtime_urls: tuple[str, str], tiny_model: Path) -> None:
    @ps.program
    async def long(s: ps.State) -> str:
        return await s.ask(ps.user("word " * 100_000), max_tokens=2)

    async with OpenAIBackend.connect(f"{runtime_urls[0]}/v1", model_path=tiny_model) as backend:
        with pytest.raises(ps.RequestRejected, match="call long/call0: HTTP 400"):
            await long.arun(backend)


async def test_nobody_there_is_a_lost_runtime() -> None:
    with pytest.raises(ps.RuntimeLost, match="no server answers at"):
        async with OpenAIBackend.connect("http://127.0.0.1:9/v1"):
            pass


def test_completions_need_a_tokenizer() -> None:
    with pytest.raises(ps.InputError, match="give model_path"):
        OpenAIBackend.connect("http://127.0.0.1:9/v1", mode="completions")


def _event(content: str | None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


@asynccontextmanager
async def scripted(
    events: list[bytes], *, status: int = 200, models: tuple[str, ...] = ("m",)
) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Serve one answer; yield the URL, and the bodies that were sent."""
    bodies: list[dict[str, Any]] = []

    async def chat(call: web.Request) -> web.StreamResponse:
        bodies.append(await call.json())
        if status != 200:
            return web.json_response({"error": {"message": "the queue\nis full"}}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(call)
        for event in events:
            await response.write(event)
        return response

    async def list_models(call: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in models]
        return web.json_response({"object": "list", "data": data})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", list_models)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", bodies
    finally:
        await runner.cleanup()


@ps.tool
def look() -> str:
    """Look around."""
    return "a door"


@ps.program
async def ask(s: ps.State) -> str:
    return await s.ask(ps.user("Well?"), max_tokens=8, temperature=0.5, top_k=4, stop="END")


@pytest.mark.parametrize("status", [429, 500])
async def test_a_refusal_is_one_line_with_the_call(status: int) -> None:
    async with (
        scripted([], status=status) as (url, bodies),
        OpenAIBackend.connect(url) as backend,
    ):
        with pytest.raises(ps.RequestRejected, match=rf"call ask/call0: HTTP {status}.*the queue is full"):
            await ask.arun(backend)
        assert len(bodies) == 1  # nothing is tried again behind one's back


async def test_an_answer_that_breaks_off_is_a_lost_runtime() -> None:
    async with scripted([_event("hal")]) as (url, _), OpenAIBackend.connect(url) as backend:
        with pytest.raises(ps.RuntimeLost, match="broke off"):
            await ask.arun(backend)


async def test_a_chat_is_sent_as_the_api_has_it() -> None:
    async with (
        scripted([_event("fine"), _event(None, "stop"), b"data: [DONE]\n\n"]) as (url, bodies),
        OpenAIBackend.connect(url) as backend,
    ):
        assert await ask.arun(backend) == "fine"
    (body,) = bodies
    assert body["messages"] == [{"role": "user", "content": "Well?"}]
    assert (body["model"], body["max_tokens"], body["top_k"], body["stop"]) == ("m", 8, 4, ["END"])
    assert body["stream"] is True
    assert isinstance(body["seed"], int)


async def test_results_of_tools_are_shown_as_a_user_says_them() -> None:
    turn = orjson.dumps({"calls": [{"tool": "look", "arguments": {}}]}).decode()

    @ps.program
    async def looks(s: ps.State) -> None:
        s += ps.user("Look.")
        await s.use(await s.act([look]))
        await s.act([look])

    async with (
        scripted([_event(turn), _event(None, "stop"), b"data: [DONE]\n\n"]) as (url, bodies),
        OpenAIBackend.connect(url) as backend,
    ):
        await looks.arun(backend)
    assert bodies[1]["messages"][-1] == {"role": "user", "content": "a door"}
    assert bodies[0]["response_format"]["type"] == "json_schema"


async def test_one_of_several_models_has_to_be_named() -> None:
    async with scripted([], models=("a", "b")) as (url, _):
        with pytest.raises(ps.InputError, match="2 models: give model, one of a, b"):
            async with OpenAIBackend.connect(url):
                pass
