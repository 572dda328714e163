"""Emulated runtimes as processes: they answer, and nothing is left of them, however it ends."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import psutil
import pytest

from preble_sgl import cli
from preble_sgl.commands.emulate import Emulated as Served
from preble_sgl.errors import InputError, RuntimeLost
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.launch import launch_emulated
from tests.runtime_ext.emulated.runtimes import config

PROFILE = """
kind = "made up"
hardware = "a test"
model = "none"
source = "nowhere"
error = "all of it"
kv_tokens = 1000
chunk_tokens = 100
[step]
floor_s = 1e-4
base_s = 0.0
token_s = 0.0
"""


def free_ports(num: int) -> int:
    """Return the first of `num` ports in a row that nobody uses, with those of their cache events."""
    for start in range(20_000 + os.getpid() % 5000, 30_000, num):
        if all(_is_free(start + offset + i) for i in range(num) for offset in (0, 1000, 2000)):
            return start
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def answers(url: str) -> bool:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 3}}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/generate", json=body) as response:
        return len((await response.json())["output_ids"]) == 3


async def wait_gone(pids: Sequence[int]) -> None:
    async with asyncio.timeout(20):
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(tmp_path: Path, *options: str) -> AsyncIterator[tuple[Process, list[str]]]:
    """Run the command with two runtimes; yields it and the lines that it prints."""
    (tmp_path / "quick.toml").write_text(PROFILE)
    port = free_ports(2)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "preble_sgl.cli", "emulate", str(tmp_path / "quick.toml")),
        *("--runtimes", "2", "--port", str(port), *options),
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            lines = [(await process.stdout.readline()).decode() for _ in range(4)]
            yield process, lines
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_the_command_serves_and_leaves_no_process_behind(tmp_path: Path, end: signal.Signals) -> None:
    async with serving(tmp_path, "--kv-events", "--order", "fcfs") as (process, lines):
        title, *listed, warning = lines
        assert title.startswith("2 emulated runtimes of none on a test (quick)")
        assert "not measurements of a GPU" in warning
        urls = [line.split()[0] for line in listed]
        assert [await answers(url) for url in urls] == [True, True]
        async with aiohttp.ClientSession() as session, session.get(f"{urls[1]}/server_info") as response:
            info = await response.json()
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(children) == 2
        process.send_signal(end)
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 0)
    await wait_gone(children)
    assert (info["schedule_policy"], info["max_total_num_tokens"]) == ("fcfs", 1000)
    assert f"tcp://127.0.0.1:{info['kv_events']['endpoint_port_base']}," in listed[1]


async def test_the_command_ends_with_a_runtime_that_dies(tmp_path: Path) -> None:
    async with serving(tmp_path) as (process, _):
        victim, other = psutil.Process(process.pid).children(recursive=True)
        victim.kill()
    assert process.returncode == 2
    assert process.stderr is not None
    assert b"ended with status -9" in await process.stderr.read()
    await wait_gone([other.pid])


async def test_runtimes_start_on_free_ports_and_end_with_the_context() -> None:
    async with launch_emulated([config(), config()], [0, 0]) as started:
        assert [await answers(one.url) for one in started] == [True, True]
        pids = [one.process.pid for one in started]
        os.kill(pids[0], signal.SIGTERM)
        with pytest.raises(RuntimeLost, match="ended with status 0"):
            await started[0].wait_lost()
    await wait_gone(pids)


async def test_a_port_in_use_is_refused_and_the_others_are_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = psutil.Process().children()
        with pytest.raises(InputError, match=f"port {port} cannot be used"):
            async with launch_emulated([config(), config()], [0, port]):
                pass
    assert psutil.Process().children() == before


async def test_a_model_that_is_none_is_refused() -> None:
    given = EmulatedConfig.from_json(
        orjson.dumps({**orjson.loads(config().to_json()), "model_path": "/none"})
    )
    with pytest.raises(InputError, match="no model at /none"):
        async with launch_emulated([given], [0]):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": 0}, "at least 1"),
        ({"port": 0}, "port 0: give one from 1"),
        ({"port": 65000}, "port 65000: give one from 1"),
        ({"order": "best"}, "there is no order best: give one of fcfs, lpm, preble_groups"),
        ({"profile": "b200"}, "there is no profile b200"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, object], message: str) -> None:
    given = {"profile": "h100-llama3-8b", "runtimes": 1} | options
    with pytest.raises(InputError, match=message):
        Served.checked(**given)  # type: ignore[arg-type]


def test_the_command_line_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preble-sgl", "emulate", "none"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("preble-sgl: there is no profile none")


def test_a_profile_becomes_the_engine_of_every_runtime() -> None:
    served = Served.checked("h100-llama3-8b", runtimes=2, port=4000, page_size=16, kv_events=True)
    assert list(served.ports) == [4000, 4001]
    given = served.config(4001)
    assert (given.profile, given.engine.step) == ("h100-llama3-8b", served.profile.step)
    assert (given.engine.kv_tokens, given.engine.page_size, given.engine.publish_every) == (415_000, 16, 40)
    assert given.kv_events is not None
    assert given.kv_events.endpoint == "tcp://127.0.0.1:5001"
    assert given.kv_events.replay_endpoint == "tcp://127.0.0.1:6001"
