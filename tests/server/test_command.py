"""`preble-sgl serve` as a process."""

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import test_utils, web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from preble_sgl import cli
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from tests.runtime_ext.emulated.runtimes import config

OPENSSL = shutil.which("openssl")
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "stream": True}


@asynccontextmanager
async def process(
    model: Path, runtime: str, *options: str, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[Process, str]]:
    """Run the command; yield it and the URL that it says."""
    command = [sys.executable, "-m", "preble_sgl.cli", "serve", "--attach", runtime, "--port", "0"]
    running = await asyncio.create_subprocess_exec(
        *(*command, "--model-path", str(model), *options),
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | (environment or {}),
    )
    try:
        assert running.stdout
        async with asyncio.timeout(30):
            while b"serving" not in (line := await running.stdout.readline()):
                assert line, "it ended"
        url = next(word for word in line.decode().split() if word.startswith("http"))
        yield running, url.removesuffix("/v1,")
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_told_to_end_it_lets_streams_finish_and_then_ends(tiny_model: Path, processes: str) -> None:
    slow = config(0.02, engine={"kv_tokens": 20_000}, model_path=str(tiny_model))
    async with (
        emulated_runtime(slow) as runtime,
        process(tiny_model, runtime, "--access-log", "--processes", processes) as (server, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        assert await response.content.readany()
        server.send_signal(signal.SIGTERM)
        rest = await response.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert await server.wait() == 0
        assert server.stderr
        told = (await server.stderr.read()).decode()
        assert '"path":"/v1/chat/completions","status":200' in told
        assert "Traceback" not in told


@pytest.mark.skipif(OPENSSL is None, reason="no openssl to make a certificate with")
@pytest.mark.parametrize("processes", ["1", "2"])
async def test_tls(tiny_model: Path, tmp_path: Path, processes: str) -> None:
    files = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=files[1])
    options = ("--private-key", files[0], "--certificate", files[1])
    async with (
        emulated_runtime(config(model_path=str(tiny_model))) as runtime,
        process(tiny_model, runtime, *options, "--processes", processes) as (_, url),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session,
        session.post(f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        assert url.startswith("https://")
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def asked(url: str) -> int:
    """Ask over a connection of its own; return the status, 0 for a connection that is reset."""
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json=BODY) as response,
        ):
            await response.read()
            return response.status
    except aiohttp.ClientError:
        return 0


async def test_processes_share_one_scheduler_and_outlive_each_other(tiny_model: Path) -> None:
    async with (
        emulated_runtime(config(engine={"kv_tokens": 200_000}, model_path=str(tiny_model))) as runtime,
        process(tiny_model, runtime, "--processes", "2") as (server, url),
    ):
        assert set(await asyncio.gather(*(asked(url) for _ in range(40)))) == {200}
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
            assert 'path="/v1/chat/completions",status="200",tenant="default"} 40.0' in await response.text()
        fronts = [one for one in psutil.Process(server.pid).children() if "serve_front" in one.cmdline()[-1]]
        assert len(fronts) == 2
        fronts[0].kill()
        statuses = [await asked(url) for _ in range(20)]
        assert statuses.count(200) >= 18
        async with asyncio.timeout(30):
            while len([one for one in psutil.Process(server.pid).children() if one.status() != "zombie"]) < 2:
                await asyncio.sleep(0.1)
        assert set(await asyncio.gather(*(asked(url) for _ in range(20)))) == {200}
        server.kill()
        for one in fronts[1:]:
            one.wait(10)


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_traces_go_where_the_environment_says(tiny_model: Path, processes: str) -> None:
    exported: list[Span] = []

    async def take(request: web.Request) -> web.Response:
        batch = ExportTraceServiceRequest.FromString(await request.read())
        exported.extend(span for r in batch.resource_spans for s in r.scope_spans for span in s.spans)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    async with (
        test_utils.TestServer(app) as collector,
        emulated_runtime(config(model_path=str(tiny_model))) as runtime,
    ):
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": str(collector.make_url("")).rstrip("/")}
        async with process(tiny_model, runtime, "--processes", processes, environment=environment) as (
            server,
            url,
        ):
            headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{url}/v1/chat/completions", json=BODY) as response,
            ):
                await response.read()
            server.terminate()
            await server.wait()
    (span,) = exported
    assert (span.name, span.trace_id) == ("POST /v1/chat/completions", bytes.fromhex("ab" * 16))
    told = {attribute.key: attribute.value for attribute in span.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["preble.worker"].string_value == runtime.removeprefix("http://")


async def test_a_port_that_is_taken_is_told_in_one_line(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with emulated_runtime(config(model_path=str(tiny_model))) as runtime:
            command = [sys.executable, "-m", "preble_sgl.cli", "serve", "--attach", runtime, "--port", port]
            command += ["--model-path", str(tiny_model), "--processes", "2"]
            server = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
            _, told = await server.communicate()
    assert server.returncode == 2
    assert b"Address already in use" in told
    assert told.count(b"\n") == 1


async def test_others_are_let_in_only_with_keys(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.delenv("PREBLE_API_KEYS", raising=False)
    monkeypatch.delenv("PREBLE_ADMIN_KEY", raising=False)
    command = [sys.executable, "-m", "preble_sgl.cli", "serve", "--attach", "http://127.0.0.1:1"]
    server = await asyncio.create_subprocess_exec(*command, "--host", "0.0.0.0", stdout=PIPE, stderr=PIPE)
    _, told = await server.communicate()
    assert server.returncode == 2
    assert b"give --keys" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keys", "none.toml"], "none.toml cannot be read"),
        (["--certificate", "none.pem"], "TLS needs both"),
        (["--certificate", "none.pem", "--private-key", "none.pem"], "none.pem cannot be read"),
        (["--fleet", "none.toml", "--runtimes", "2"], "leave out the options"),
    ],
)
def test_bad_options_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["preble-sgl", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
