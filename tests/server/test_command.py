"""`preble-sgl serve` as a process."""

import asyncio
import shutil
import signal
import ssl
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from preble_sgl import cli
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from tests.runtime_ext.emulated.runtimes import config

OPENSSL = shutil.which("openssl")
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "stream": True}


@asynccontextmanager
async def process(model: Path, runtime: str, *options: str) -> AsyncIterator[tuple[Process, str]]:
    """Run the command; yield it and the URL that it says."""
    command = [sys.executable, "-m", "preble_sgl.cli", "serve", "--attach", runtime, "--port", "0"]
    running = await asyncio.create_subprocess_exec(
        *command, "--model-path", str(model), *options, stdout=PIPE, stderr=PIPE
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


async def test_told_to_end_it_lets_streams_finish_and_then_ends(tiny_model: Path) -> None:
    slow = config(0.02, engine={"kv_tokens": 20_000}, model_path=str(tiny_model))
    async with (
        emulated_runtime(slow) as runtime,
        process(tiny_model, runtime, "--access-log") as (server, url),
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
async def test_tls(tiny_model: Path, tmp_path: Path) -> None:
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
        process(tiny_model, runtime, *options) as (_, url),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session,
        session.post(f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        assert url.startswith("https://")
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


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
