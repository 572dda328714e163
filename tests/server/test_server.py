"""The server over emulated runtimes: what goes through, what is added, what is refused."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from preble_sgl.core import ProgramId
from preble_sgl.runtime_ext.tasks import running
from preble_sgl.server import open_programs
from preble_sgl.server.front import ServerOptions
from preble_sgl.server.http import Limits
from preble_sgl.server.tenants import Tenant, Tenants, digest
from tests.server.serving import Reply, Served, served_emulated

pytestmark = pytest.mark.usefixtures("with_and_without_front")

CHAT = "/v1/chat/completions"
LONG = "the same long document " * 20


def chat(text: str = "hello", num_tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": num_tokens, **more}


def content(reply: Reply) -> Any:
    return orjson.loads(reply.body)


def events(reply: Reply) -> list[Any]:
    lines = reply.body.split(b"\n\n")[:-1]
    assert lines.pop() == b"data: [DONE]"
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines]


async def test_an_answer_says_where_it_was_made_and_what_was_cached(emulated: Served) -> None:
    first = await emulated.post(CHAT, chat(LONG))
    second = await emulated.post(CHAT, chat(LONG))
    assert first.status == second.status == 200
    assert first.headers["x-preble-reason"] == "explore"
    assert second.headers["x-preble-reason"] == "exploit"
    assert second.headers["x-preble-worker"] == first.headers["x-preble-worker"]
    usage = content(second)["usage"]
    assert int(second.headers["x-preble-cached-tokens"]) == usage["prompt_tokens_details"]["cached_tokens"]
    assert int(second.headers["x-preble-matched-tokens"]) == usage["prompt_tokens"] - 1
    assert content(first)["choices"] == content(second)["choices"]


async def test_placement_counts_the_tokens_that_the_runtime_counts(emulated: Served) -> None:
    reply = await emulated.post(CHAT, chat(LONG))
    await emulated.wait_idle()
    (worker,) = [one for one in emulated.fleet.describe_workers() if one["num_finished"]]
    assert worker["prompt_tokens"] == content(reply)["usage"]["prompt_tokens"]


async def test_a_stream_is_what_the_runtime_streams(emulated: Served) -> None:
    whole = content(await emulated.post(CHAT, chat(num_tokens=6)))["choices"][0]["message"]["content"]
    streamed = await emulated.post(CHAT, chat(num_tokens=6, stream=True))
    assert streamed.headers["Content-Type"].startswith("text/event-stream")
    got = events(streamed)
    assert all(event["choices"] for event in got), "nobody asked for the usage"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in got) == whole


async def test_the_usage_comes_at_the_end_of_a_stream_for_who_asks(emulated: Served) -> None:
    body = chat(num_tokens=6, stream=True, stream_options={"include_usage": True})
    last = events(await emulated.post(CHAT, body))[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    await emulated.wait_idle()
    assert sum(worker["output_tokens"] for worker in emulated.fleet.describe_workers()) == 6


@pytest.mark.parametrize("streams", [False, True])
async def test_the_native_route_and_plain_completions(emulated: Served, streams: bool) -> None:
    native = {"text": "hello", "sampling_params": {"max_new_tokens": 3}, "stream": streams}
    reply = await emulated.post("/generate", native)
    last = events(reply)[-1] if streams else content(reply)
    assert last["meta_info"]["completion_tokens"] == 3
    plain = await emulated.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "stream": streams})
    assert plain.status == 200
    ids = await emulated.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3})
    assert content(ids)["usage"]["prompt_tokens"] == 3
    await emulated.wait_idle()
    assert sum(worker["output_tokens"] for worker in emulated.fleet.describe_workers()) == 9


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (CHAT, b"{", "not JSON"),
        (CHAT, b"", "not JSON"),
        (CHAT, b"[1]", "not a JSON object"),
        (CHAT, b"\xff\xfe", "not JSON"),
        (CHAT, {}, "has no messages"),
        (CHAT, {"messages": []}, "at least one message"),
        (CHAT, {"messages": ["x"]}, "needs a role"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "neither a text nor a list"),
        (CHAT, chat(num_tokens="many"), "max_tokens='many'"),  # type: ignore[arg-type]
        (CHAT, chat(num_tokens=-1), "0 or more"),
        ("/v1/completions", {"prompt": ""}, "prompt is empty"),
        ("/v1/completions", {"prompt": [1, "a"]}, "neither a text nor a list"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt is empty"),
        ("/generate", {}, "prompt is empty"),
        ("/generate", {"input_ids": [2**40]}, "neither a text nor a list"),
        ("/generate", {"text": "a", "sampling_params": 3}, ""),
    ],
)
async def test_what_cannot_be_read_is_refused_clearly(
    emulated: Served, path: str, body: object, told: str
) -> None:
    reply = await emulated.post(path, body)
    assert reply.status == 400
    assert told in reply.body.decode()
    await emulated.wait_idle()


async def test_what_a_runtime_refuses_is_passed_on_as_it_is(emulated: Served) -> None:
    reply = await emulated.post(CHAT, chat(logprobs=True))
    assert reply.status == 400
    assert content(reply)["object"] == "error"
    await emulated.wait_idle()
    assert emulated.fleet.scheduler.snapshot().num_running == 0


async def test_a_body_beyond_the_limit_is_refused(tiny_model: Path) -> None:
    options = ServerOptions(limits=Limits(body_bytes=1000))
    async with served_emulated(tiny_model, options=options, num=1) as server:
        assert (await server.post(CHAT, chat("x" * 2000))).status == 413
        assert (await server.post(CHAT, chat("x"))).status == 200


async def test_a_request_may_take_only_so_long(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=1, step_s=0.05) as server:
        reply = await server.post(CHAT, chat(num_tokens=1000), x_request_timeout="0.2")
        assert reply.status == 504
        assert "0.2 s" in reply.error
        await server.wait_idle()
        assert (await server.post(CHAT, chat(), x_request_timeout="soon")).status == 400


async def test_the_deadline_of_a_stream_ends_it_with_an_error(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=1, step_s=0.05) as server:
        reply = await server.post(CHAT, chat(num_tokens=1000, stream=True), x_request_timeout="0.3")
        assert reply.status == 200
        assert b'"code":"deadline"' in reply.body.split(b"\n\n")[-2]


async def test_more_than_may_wait_get_a_429(tiny_model: Path) -> None:
    options = ServerOptions(max_running=1, max_waiting=1)
    async with served_emulated(tiny_model, options=options, num=1, step_s=0.02) as server:
        replies = await asyncio.gather(*(server.post(CHAT, chat(num_tokens=20)) for _ in range(5)))
        assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429]
        refused = next(reply for reply in replies if reply.status == 429)
        assert int(refused.headers["Retry-After"]) >= 1


KEYS = {digest("key-of-a"): Tenant("a", namespace="a"), digest("key-of-b"): Tenant("b", namespace="b")}


async def test_tenants_do_not_share_a_cache_unless_they_may(tiny_model: Path) -> None:
    shared = {
        digest("key-of-c"): Tenant("c", namespace=""),
        digest("key-of-d"): Tenant("d", namespace="", is_admin=True),
    }
    async with served_emulated(tiny_model, Tenants(KEYS | shared), num=1) as server:
        cached = {}
        for who in "abcd":
            reply = await server.post(CHAT, chat(LONG), authorization=f"Bearer key-of-{who}")
            cached[who] = int(reply.headers["x-preble-cached-tokens"])
        again = await server.post(CHAT, chat(LONG), authorization="Bearer key-of-a")
        assert int(again.headers["x-preble-cached-tokens"]) > 0
        assert cached["a"] == cached["b"] == cached["c"] == 0
        assert cached["d"] > 0


async def test_who_shares_a_cache_cannot_name_another_tenant_s_part(tiny_model: Path) -> None:
    shared = {digest("key-of-c"): Tenant("c", namespace="")}
    async with served_emulated(tiny_model, Tenants(KEYS | shared), num=1) as server:
        await server.post(CHAT, chat(LONG), authorization="Bearer key-of-a")
        for salt in ("a", "/a", "a/"):
            body = chat(LONG, cache_salt=salt)
            reply = await server.post(CHAT, body, authorization="Bearer key-of-c")
            assert reply.headers["x-preble-cached-tokens"] == "0", salt


async def test_an_id_cannot_write_headers(emulated: Served) -> None:
    reply = await emulated.post(CHAT, chat(user="a\r\nx-evil: 1\n\u2028ü"))
    assert reply.status == 200
    assert "x-evil" not in reply.headers
    assert reply.headers["x-preble-program"].startswith("default/a%0D%0Ax-evil")


async def test_a_runtime_s_settings_are_told_without_its_secrets(emulated: Served) -> None:
    told = set(content(await emulated.get("/server_info")))
    assert "max_total_num_tokens" in told
    assert not told & {"api_key", "admin_api_key", "launch_command", "kv_events"}


async def test_without_a_key_only_health_is_told(tiny_model: Path) -> None:
    admin = {digest("key-of-d"): Tenant("d", is_admin=True)}
    async with served_emulated(tiny_model, Tenants(KEYS | admin), num=1) as server:
        assert (await server.post(CHAT, chat())).status == 401
        for path in ("/v1/models", "/v1/loads", "/admin/workers"):
            assert (await server.get(path)).status == 401, path
        assert (await server.get("/admin/workers", authorization="Bearer key-of-a")).status == 403
        assert (await server.get("/admin/workers", authorization="Bearer key-of-d")).status == 200
        assert (await server.get("/health")).status == 200
        assert (await server.get("/ready")).status == 200


async def test_a_program_is_announced_called_and_let_go(emulated: Served) -> None:
    plan = {"program_id": "mine", "kv_tokens": 100, "prefixes": ["hello", [1, 2]], "deadline_s": 60}
    json = {"content_type": "application/json"}
    assert content(await emulated.post("/v1/programs", plan, **json)) == {"program_id": "mine"}
    assert (await emulated.post("/v1/programs", plan, **json)).status == 400
    reply = await emulated.post(CHAT, chat(), x_preble_program="mine")
    assert reply.headers["x-preble-program"] == "default/mine"
    for step, body in (("pause", {"expected_s": 1}), ("give_back", {"num_tokens": 10})):
        assert (await emulated.post(f"/v1/programs/mine/{step}", body, **json)).status == 204
    async with emulated.session.delete(f"{emulated.url}/v1/programs/mine") as ended:
        assert ended.status == 204
    async with emulated.session.delete(f"{emulated.url}/v1/programs/mine") as ended:
        assert ended.status == 404
    assert (await emulated.post("/v1/programs/mine/pause", {"expected_s": 1}, **json)).status == 404


async def test_metrics_count_what_was_served(emulated: Served) -> None:
    await emulated.post(CHAT, chat(LONG))
    await emulated.post(CHAT, chat(LONG))
    await emulated.post(CHAT, b"{")
    text = (await emulated.get("/metrics")).body.decode()
    assert 'preble_http_requests_total{path="/v1/chat/completions",status="200",tenant="default"} 2.0' in text
    assert 'status="400"' in text
    assert 'reason="exploit"' in text
    prompt = sum(float(line.split()[-1]) for line in text.splitlines() if "prompt_tokens_total{" in line)
    assert prompt == sum(worker["prompt_tokens"] for worker in emulated.fleet.describe_workers())


async def test_a_worker_is_drained_while_others_go_on(emulated: Served) -> None:
    leaving, staying = emulated.fleet.worker_ids
    reply = await emulated.post(f"/admin/workers/{leaving}/drain", {}, content_type="application/json")
    assert reply.status == 202
    async with asyncio.timeout(5):
        while leaving in emulated.fleet.worker_ids:
            await asyncio.sleep(0.01)
    replies = [await emulated.post(CHAT, chat(str(number))) for number in range(4)]
    assert {reply.headers["x-preble-worker"] for reply in replies} == {staying}
    assert (
        await emulated.post("/admin/workers/none/drain", {}, content_type="application/json")
    ).status == 404


async def test_the_documentation_names_every_route(emulated: Served) -> None:
    paths = content(await emulated.get("/openapi.json"))["paths"]
    assert {CHAT, "/v1/completions", "/v1/embeddings", "/generate", "/v1/programs", "/metrics"} <= set(paths)
    assert (await emulated.get("/docs")).status == 200


async def test_calls_behind_a_prefix_need_not_wait_for_the_end_of_a_whole_answer(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=1, step_s=0.02) as server:
        leader = asyncio.create_task(server.post(CHAT, chat(LONG, num_tokens=100)))
        while not server.fleet.scheduler.num_running:
            await asyncio.sleep(0.01)
        follower = await server.post(CHAT, chat(LONG, num_tokens=2))
        assert int(follower.headers["x-preble-cached-tokens"]) > 0
        assert not leader.done()
        assert (await leader).status == 200


async def test_a_route_that_is_not_there_is_told_in_the_same_shape(emulated: Served) -> None:
    missing, wrong = await emulated.get("/v1/nothing"), await emulated.get(CHAT)
    assert (missing.status, missing.error) == (404, "/v1/nothing: Not Found")
    assert wrong.status == 405
    assert "Method Not Allowed" in wrong.error


async def test_a_program_that_made_its_calls_is_let_go_of_soon(
    emulated: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_programs, "SWEEP_S", 0.01)
    monkeypatch.setattr(open_programs, "COMPLETE_IDLE_S", 0.05)
    plan = {"program_id": "two", "num_calls": 2, "output_tokens": 7}
    await emulated.post("/v1/programs", plan, content_type="application/json")
    programs, name = emulated.gateway.programs, ProgramId("default/two")
    assert programs.expected_output_len(name) == 7
    async with running(programs.sweep()), asyncio.timeout(10):
        await emulated.post(CHAT, chat(), x_preble_program="two")
        await asyncio.sleep(0.2)
        programs.require(name)
        await emulated.post(CHAT, chat(), x_preble_program="two")
        while len(programs):
            await asyncio.sleep(0.01)
    assert emulated.fleet.scheduler.snapshot().num_open_programs == 0


async def test_a_program_whose_client_died_is_let_go_of(
    emulated: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_programs, "SWEEP_S", 0.01)
    programs = emulated.gateway.programs
    for name in ("idle", "busy", "pausing"):
        begun = await emulated.post("/v1/programs", {"program_id": name}, content_type="application/json")
        assert begun.status == 201
    programs.idle_s = 0.3
    await emulated.post("/v1/programs/pausing/pause", {"expected_s": 60}, content_type="application/json")
    async with running(programs.sweep()), asyncio.timeout(10):
        while len(programs) > 2:
            programs.touch(ProgramId("default/busy"))
            await asyncio.sleep(0.01)
    programs.require(ProgramId("default/busy"))
    programs.require(ProgramId("default/pausing"))
