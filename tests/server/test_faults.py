"""What the server does when clients, runtimes or the network misbehave, over emulated runtimes."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from preble_sgl import breaker
from preble_sgl.runtime_ext.emulated import openai_api
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.launch import EmulatedProcess, launch_emulated
from preble_sgl.server import serve
from preble_sgl.server.front import ServerOptions
from preble_sgl.server.http import Limits
from tests.runtime_ext.emulated.runtimes import config
from tests.server.serving import Served, served, served_emulated

pytestmark = pytest.mark.usefixtures("with_and_without_front")

CHAT = "/v1/chat/completions"


def chat(num_tokens: int, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": num_tokens, **more}


def slow(model_path: Path) -> EmulatedConfig:
    return config(0.02, engine={"kv_tokens": 20_000}, model_path=str(model_path))


async def kill(process: EmulatedProcess) -> None:
    process.process.kill()
    await process.process.wait()


async def raw(server: Served, data: bytes) -> bytes:
    """Send bytes over a connection of their own; return what comes until it is closed."""
    port = int(server.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_client_that_leaves_takes_its_request_with_it(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=1, step_s=0.02) as server:
        for streams in (True, False):
            asking = asyncio.create_task(server.post(CHAT, chat(5000, stream=streams)))
            while not server.fleet.scheduler.num_running:
                await asyncio.sleep(0.01)
            asking.cancel()
            await server.wait_idle()
        assert 'status="499"' in (await server.get("/metrics")).body.decode()


async def test_a_runtime_lost_before_the_first_byte_is_replaced_unseen(tiny_model: Path) -> None:
    async with (
        launch_emulated([slow(tiny_model)] * 2, [0, 0]) as running,
        served([one.url for one in running], tiny_model) as server,
    ):
        asking = asyncio.create_task(server.post(CHAT, chat(50)))
        while not server.fleet.scheduler.num_running:
            await asyncio.sleep(0.01)
        (busy,) = [one for one in server.fleet.worker_ids if server.fleet.num_running(one)]
        (dying,) = [one for one in running if one.url.endswith(busy)]
        await kill(dying)
        reply = await asking
        assert reply.status == 200
        assert reply.headers["x-preble-worker"] != busy


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(100, stream=True, temperature=0)),
        ("/generate", {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 100}}),
    ],
)
async def test_a_stream_whose_runtime_is_lost_goes_on_elsewhere(
    tiny_model: Path, path: str, body: dict[str, Any]
) -> None:
    async with (
        launch_emulated([slow(tiny_model)] * 2, [0, 0]) as running,
        served([one.url for one in running], tiny_model) as server,
        server.session.post(server.url + path, json=body) as response,
    ):
        begun = await response.content.readany()
        (dying,) = [one for one in running if one.url.endswith(response.headers["x-preble-worker"])]
        await kill(dying)
        events = (begun + await response.content.read()).split(b"\n\n")
        assert events[-2] == b"data: [DONE]"
        await server.wait_idle()
        (record,) = server.gateway.recent
        assert record.num_attempts == 2
        last = orjson.loads(events[-3][6:])
        assert last["meta_info"]["completion_tokens"] == 100 if path == "/generate" else last["choices"]


async def test_a_stream_that_cannot_go_on_ends_with_an_error(tiny_model: Path) -> None:
    async with (
        launch_emulated([slow(tiny_model)] * 2, [0, 0]) as running,
        served([one.url for one in running], tiny_model) as server,
        server.session.post(server.url + CHAT, json=chat(5000, stream=True)) as response,
    ):
        assert await response.content.readany()
        (dying,) = [one for one in running if one.url.endswith(response.headers["x-preble-worker"])]
        await kill(dying)
        rest = await response.content.read()
    assert b"[DONE]" not in rest
    *_, last, end = rest.split(b"\n\n")
    assert end == b""
    assert "error" in orjson.loads(last.removeprefix(b"data: "))


async def test_a_runtime_that_fails_at_everything_is_left_alone_for_a_while(
    emulated: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.5)
    failing, answer = emulated.fleet.worker_ids[0], openai_api._answer

    async def failing_answer(call: web.Request, *how: Any) -> web.StreamResponse:
        return web.Response(status=500) if call.host == failing else await answer(call, *how)

    with monkeypatch.context() as patched:
        patched.setattr(openai_api, "_answer", failing_answer)
        asked = [emulated.post(CHAT, chat(2, f"{number} different")) for number in range(20)]
        replies = await asyncio.gather(*asked)
        assert failing not in emulated.fleet.worker_ids
        assert sum(reply.status == 500 for reply in replies) <= 2, "those that met it twice"
        assert {(await emulated.post(CHAT, chat(2, str(number)))).status for number in range(5)} == {200}
    async with asyncio.timeout(10):
        while failing not in emulated.fleet.worker_ids:
            await asyncio.sleep(0.02)
    assert (await emulated.post(CHAT, chat(2))).status == 200


async def test_the_only_runtime_is_not_left_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing_answer(call: web.Request, *how: Any) -> web.StreamResponse:
        return web.json_response({"message": "out of order"}, status=500)

    async with served_emulated(tiny_model, num=1) as server:
        monkeypatch.setattr(openai_api, "_answer", failing_answer)
        replies = [await server.post(CHAT, chat(2)) for _ in range(5)]
        assert {reply.status for reply in replies} == {500}
        assert {reply.body for reply in replies} == {b'{"message": "out of order"}'}
        monkeypatch.undo()
        assert (await server.post(CHAT, chat(2))).status == 200


async def test_with_every_runtime_down_there_is_a_503_and_then_recovery(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        (running,) = await first.enter_async_context(launch_emulated([slow(tiny_model)], [0]))
        port = int(running.url.rpartition(":")[2])
        server = await stack.enter_async_context(served([running.url], tiny_model))
        assert (await server.post(CHAT, chat(2))).status == 200
        await kill(running)
        async with asyncio.timeout(10):
            while (await server.get("/ready")).status == 200:
                await server.post(CHAT, chat(2), x_request_timeout="0.2")
        reply = await server.post(CHAT, chat(2))
        assert reply.status == 503
        assert int(reply.headers["Retry-After"]) >= 1
        await first.aclose()
        await stack.enter_async_context(launch_emulated([slow(tiny_model)], [port]))
        async with asyncio.timeout(20):
            while (await server.get("/ready")).status != 200:
                await asyncio.sleep(0.05)
        assert (await server.post(CHAT, chat(2))).status == 200


async def test_headers_that_dawdle_or_flood_end_the_connection(
    emulated: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEADERS_S", 0.2)
    assert await raw(emulated, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-") == b""
    assert await raw(emulated, b"") == b""
    flood = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Many: " + b"y" * 100_000 + b"\r\n\r\n"
    assert b"200" not in await raw(emulated, flood)
    assert (await emulated.get("/health")).status == 200


async def test_a_body_that_dawdles_is_refused(tiny_model: Path) -> None:
    options = ServerOptions(limits=Limits(body_s=0.2))
    async with served_emulated(tiny_model, options=options, num=1) as server:
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
        assert b" 408 " in (await raw(server, head)).split(b"\r\n")[0]


async def test_a_client_that_reads_nothing_is_let_go(tiny_model: Path) -> None:
    options = ServerOptions(limits=Limits(stalled_s=0.3))
    async with served_emulated(tiny_model, options=options, num=1, kv_tokens=200_000) as server:
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = orjson.dumps({"text": "hi", "stream": True, "sampling_params": {"max_new_tokens": 9000}})
        writer.write(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
        await server.wait_idle()
        writer.close()
        assert 'status="499"' in (await server.get("/metrics")).body.decode()


async def test_a_thousand_streams_at_once_lose_none(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=2, step_s=0.002, kv_tokens=200_000) as server:
        texts = [f"stream number {number}" for number in range(1000)]
        replies = await asyncio.gather(*(server.post(CHAT, chat(5, text, stream=True)) for text in texts))
        assert {reply.status for reply in replies} == {200}
        assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
        await server.wait_idle()
        assert sum(worker["output_tokens"] for worker in server.fleet.describe_workers()) == 5000
        server.fleet.scheduler.check_invariants()


async def test_told_to_end_it_lets_streams_finish(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=1, step_s=0.02) as server:
        asking = asyncio.create_task(server.post(CHAT, chat(20, stream=True)))
        while not server.fleet.scheduler.num_running:
            await asyncio.sleep(0.01)
        server.gateway.is_closing = True
        assert (await server.get("/ready")).status == 503
        reply = await asking
        assert reply.body.endswith(b"data: [DONE]\n\n")
