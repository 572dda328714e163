"""Launching: what is refused, and that nothing is left, however it ends."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, LaunchError, RuntimeLost
from preble_sgl.runtime_ext import environment, guard
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtime, launch_runtimes
from tests.runtime_ext import fake_sglang, hold_fleet, hold_runtime
from tests.runtime_ext.footprint import Footprint, footprint, guards_of
from tests.runtime_ext.requests import request, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the launcher, also in a process that a test starts, puts its folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put the fake SGLang before the real one, for every process that is started from now on."""
    package = tmp_path / "python" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(fake_sglang.__file__, package / "launch_server.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes for a model, with a name that no other test uses."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


def spec(model: Path, worker_id: str = "w0", **settings: Any) -> LaunchSpec:
    return LaunchSpec(model_path=model, worker_id=WorkerId(worker_id), **settings)


async def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        async with launch_runtime(spec(tmp_path / "none")):
            pass


async def test_a_directory_without_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"it has no tokenizer\.json"):
        async with launch_runtime(spec(model)):
            pass


async def test_a_port_in_use_is_refused(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use"):
            async with launch_runtime(spec(model, port=port)):
                pass


async def test_two_runtimes_of_one_name_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match="worker_id='w0' is given to 2 runtimes"):
        async with launch_runtimes([spec(model), spec(model)]):
            pass


async def test_a_gpu_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="there is no GPU 99"):
        async with launch_runtime(spec(model, gpus=(99,))):
            pass


async def test_a_missing_requirement_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("sglang==0.0.1\n")
    monkeypatch.setattr(environment, "CPU_NO_DEPS", pins)
    with pytest.raises(
        LaunchError,
        match=r"sglang is .* \(needed: sglang==0\.0\.1\); run: pip install --no-deps -r .*pins\.txt",
    ):
        async with launch_runtime(spec(model)):
            pass


@pytest.mark.usefixtures("fake")
async def test_nothing_is_left_after_a_normal_end(model: Path, folders: Path) -> None:
    async with launch_runtimes([spec(model, "a"), spec(model, "b")]) as (a, b):
        assert (a.info.worker_id, b.info.worker_id) == ("a", "b")
        held = footprint(model, folders)
        # For each: the guard, the server and a stray; one file of shared memory; one folder.
        assert (len(held.processes), len(held.shared_memory), len(held.folders)) == (6, 2, 2)
    assert held.remains() == []


@pytest.mark.usefixtures("fake")
async def test_nothing_is_left_after_an_error_in_the_body(model: Path, folders: Path) -> None:
    held = []

    async def fail() -> None:
        async with launch_runtime(spec(model)):
            held.append(footprint(model, folders))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert held[0].remains() == []


@pytest.mark.usefixtures("fake")
async def test_nothing_is_left_when_one_of_two_dies_at_its_start(model: Path, folders: Path) -> None:
    specs = [
        spec(model, "good", extra_args=("--fake", "hang")),
        spec(model, "bad", extra_args=("--fake", "die")),
    ]
    with pytest.raises(LaunchError, match="the fake was told to die") as caught:
        async with launch_runtimes(specs):
            pass
    assert caught.value.worker_id == "bad"
    assert footprint(model, folders).processes == frozenset()
    (evidence,) = folders.glob("preble_sgl-*")
    assert [file.name for file in evidence.iterdir()] == ["log"]


@pytest.mark.usefixtures("fake")
async def test_a_runtime_that_never_gets_ready_is_given_up(model: Path, folders: Path) -> None:
    hanging = spec(model, extra_args=("--fake", "hang"), startup_timeout_s=1)
    with pytest.raises(LaunchError, match="was not ready after 1 s"):
        async with launch_runtime(hanging):
            pass
    assert footprint(model, folders) == Footprint(frozenset(), frozenset(), frozenset())


@pytest.mark.usefixtures("fake")
async def test_nothing_is_left_when_the_start_is_cancelled(model: Path, folders: Path) -> None:
    async def start() -> None:
        async with launch_runtime(spec(model, extra_args=("--fake", "hang"))):
            pass

    task = asyncio.create_task(start())
    async with asyncio.timeout(60):
        while not (held := footprint(model, folders)).shared_memory:
            await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.remains() == []


@pytest.mark.usefixtures("fake")
async def test_a_runtime_that_dies_is_lost_and_leaves_only_its_log(model: Path, folders: Path) -> None:
    async with launch_runtime(spec(model)) as runtime:
        held = footprint(model, folders)
        guards = {Path(f"/proc/{pid}") for pid in guards_of(model)}  # not reaped until we stop
        await asyncio.sleep(2 * guard.POLL_S)  # so that the guard has seen the shared memory
        with pytest.raises(RuntimeLost, match="runtime w0 at "):
            await run(runtime, request([1]))
        await Footprint(held.processes - guards, held.shared_memory, frozenset()).wait_gone()
    (evidence,) = held.folders
    assert [file.name for file in evidence.iterdir()] == ["log"]


@pytest.mark.usefixtures("fake")
async def test_a_killed_guard_takes_the_runtime_with_it(model: Path, folders: Path) -> None:
    async with launch_runtime(spec(model, extra_args=("--fake", "tidy"))):
        held = footprint(model, folders)
        (guard_pid,) = guards_of(model)
        os.kill(guard_pid, signal.SIGKILL)
    await Footprint(held.processes, frozenset(), frozenset()).wait_gone()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_nothing_is_left_when_the_program_is_ended(
    model: Path, folders: Path, number: signal.Signals
) -> None:
    await end_program_and_wait(model, folders, number)


@pytest.mark.sglang
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_nothing_of_a_supervised_fleet_of_real_sglang_is_left_when_the_program_is_ended(
    tiny_model: Path, tmp_path: Path, folders: Path, number: signal.Signals
) -> None:
    own_model = tmp_path / "own-model"  # to tell its processes from those of the shared runtimes
    own_model.symlink_to(tiny_model)
    await end_program_and_wait(own_model, folders, number, hold_fleet.__name__)


@pytest.mark.sglang
async def test_real_sglang_that_dies_at_its_start_says_why(tiny_model: Path, folders: Path) -> None:
    with pytest.raises(LaunchError, match="unrecognized arguments: --no-such-flag"):
        async with launch_runtime(spec(tiny_model, extra_args=("--no-such-flag",))):
            pass


async def end_program_and_wait(
    model: Path, folders: Path, number: signal.Signals, module: str = hold_runtime.__name__
) -> None:
    """Start a program that holds a runtime, end it, and see everything go."""
    async with program(module, str(model)) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        held = footprint(model, folders)
        assert len(held.processes) >= 3
        assert held.shared_memory
        assert held.folders
        process.send_signal(number)
        printed = await process.stdout.read()
        assert (number == signal.SIGINT) == (printed == b"clean\n")
        await process.wait()
    if number == signal.SIGINT:
        assert held.remains() == []
    await held.wait_gone()


@asynccontextmanager
async def program(module: str, *arguments: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdout=PIPE, cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
