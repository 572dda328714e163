"""Keeping runtimes running, with a stand-in for SGLang that starts in no time."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, LaunchError, RuntimeLost, UnknownIdError
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.supervisor import AttachSpec, Supervisor, Watching, supervised
from tests.runtime_ext import fake_sglang
from tests.runtime_ext.footprint import footprint, guards_of

QUICK = Watching(poll_s=0.02, timeout_s=0.3, misses=2, backoff_s=0.01, max_failures=2, patience_s=0.1)
W = WorkerId("w")


class Log:
    """A listener that remembers what it was told, and lets tests wait for it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.runtimes: list[SglangRuntime] = []

    def on_runtime_up(self, runtime: SglangRuntime) -> None:
        self.runtimes.append(runtime)
        self.told.append("up")

    def on_runtime_down(self, worker_id: WorkerId, why: str) -> None:
        self.told.append("down")

    def on_runtime_gone(self, worker_id: WorkerId) -> None:
        self.told.append("gone")

    async def wait(self, *told: str) -> None:
        async with asyncio.timeout(30):
            while self.told != list(told):
                await asyncio.sleep(0.01)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The stand-in, before the real SGLang for every process that is started from now on."""
    package = tmp_path / "python" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(fake_sglang.__file__, package / "launch_server.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return package


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


def kill_server(model: Path) -> None:
    """Kill the server under the only guard."""
    (guard_pid,) = guards_of(model)
    children = Path(f"/proc/{guard_pid}/task/{guard_pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


@asynccontextmanager
async def watched(*specs: LaunchSpec | AttachSpec) -> AsyncIterator[tuple[Supervisor, Log]]:
    log = Log()
    ours = [spec for spec in specs if isinstance(spec, LaunchSpec)]
    others = [spec for spec in specs if isinstance(spec, AttachSpec)]
    async with supervised(ours, others, watching=QUICK) as supervisor:
        supervisor.watch(log)
        yield supervisor, log


@pytest.mark.usefixtures("package")
async def test_a_runtime_that_dies_is_started_again_and_its_log_is_kept(model: Path, tmp_path: Path) -> None:
    spec = LaunchSpec(model_path=model, worker_id=W, log_dir=tmp_path / "logs")
    async with watched(spec) as (supervisor, log):
        (first,) = supervisor.runtimes
        kill_server(model)
        await log.wait("down", "up")
        assert log.runtimes == list(supervisor.runtimes)
        assert log.runtimes[0] is not first
    starts = [line for line in (tmp_path / "logs" / "w.log").read_text().splitlines() if "starts at" in line]
    assert len(starts) == 2
    assert footprint(model, tmp_path).remains() == []


async def test_one_that_does_not_start_any_more_is_given_up_with_the_reason(
    package: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(LaunchSpec(model_path=model, worker_id=W)) as (supervisor, log):
        (package / "launch_server.py").write_text("import sys; sys.exit('no more')")
        kill_server(model)
        await log.wait("down", "gone")
        assert supervisor.runtimes == ()
    assert "start 2 failed" in caplog.text
    assert "runtime w is given up" in caplog.text
    assert "no more" in caplog.text


@pytest.mark.usefixtures("package")
async def test_a_runtime_that_hangs_is_ended_and_replaced(model: Path) -> None:
    async with watched(LaunchSpec(model_path=model, worker_id=W)) as (_, log):
        (guard_pid,) = guards_of(model)
        (server, *_) = Path(f"/proc/{guard_pid}/task/{guard_pid}/children").read_text().split()
        os.kill(int(server), signal.SIGSTOP)
        await log.wait("down", "up")
        assert not Path(f"/proc/{server}").exists()


@pytest.mark.usefixtures("package")
async def test_a_suspect_that_lives_is_used_again_at_once(model: Path) -> None:
    async with watched(LaunchSpec(model_path=model, worker_id=W)) as (supervisor, log):
        (runtime,) = supervisor.runtimes
        supervisor.suspect(W)
        await log.wait("up")
        assert log.runtimes == [runtime]


@pytest.mark.usefixtures("package")
async def test_a_retired_runtime_is_ended_and_not_started_again(model: Path, tmp_path: Path) -> None:
    async with watched(LaunchSpec(model_path=model, worker_id=W)) as (supervisor, log):
        await supervisor.retire(W)
        assert footprint(model, tmp_path).remains() == []
        assert (supervisor.runtimes, log.told) == ((), [])
        with pytest.raises(UnknownIdError, match="there is no runtime w"):
            await supervisor.retire(W)


@pytest.mark.usefixtures("package")
async def test_one_that_cannot_start_at_first_leaves_none_running(model: Path, tmp_path: Path) -> None:
    good = LaunchSpec(model_path=model, worker_id=WorkerId("good"))
    bad = LaunchSpec(model_path=model, worker_id=WorkerId("bad"), extra_args=("--fake", "die"))
    with pytest.raises(LaunchError, match="the fake was told to die"):
        async with watched(good, bad):
            pass
    assert footprint(model, tmp_path).processes == frozenset()


@pytest.mark.usefixtures("package")
async def test_flags_that_sglang_does_not_know_are_refused_before_anything_starts(model: Path) -> None:
    spec = LaunchSpec(model_path=model, worker_id=W, flags={"port": 1})
    with pytest.raises(InputError, match="port is set by `port`"):
        async with watched(spec):
            pass


async def test_two_runtimes_of_one_name_are_refused_before_anything_starts() -> None:
    spec = AttachSpec(url="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"name='127\.0\.0\.1:9' is given to 2 runtimes"):
        async with watched(spec, spec):
            pass


# A server that is not ours


@asynccontextmanager
async def server(port: int = 0) -> AsyncIterator[tuple[web.AppRunner, int]]:
    """A server that says it is an SGLang, on a port of its own."""
    settings = {
        "model_path": "m",
        "version": "0",
        "device": "cpu",
        "max_total_num_tokens": 1000,
        "page_size": 1,
        "max_req_input_len": 900,
    }

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(settings)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    assert site._server is not None
    try:
        yield runner, site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    finally:
        await runner.cleanup()


async def test_an_attached_server_that_goes_is_used_again_when_it_is_back() -> None:
    async with server() as (runner, port):
        spec = AttachSpec(url=f"http://127.0.0.1:{port}")
        async with watched(spec) as (supervisor, log):
            assert supervisor.runtimes[0].info.worker_id == f"127.0.0.1:{port}"
            await runner.cleanup()
            await log.wait("down", "gone")  # calls do not wait for it any longer
            async with server(port):
                await log.wait("down", "gone", "up")


async def test_an_attached_server_that_is_not_there_at_first_is_an_error() -> None:
    with pytest.raises(RuntimeLost, match="no runtime answers at"):
        async with watched(AttachSpec(url="http://127.0.0.1:9")):
            pass
