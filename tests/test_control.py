"""Commands to a fleet that runs in another process of the same user."""

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from preble_sgl.commands.workers import worker_table
from preble_sgl.control import add_worker, controlled, drain_worker, list_workers
from preble_sgl.core import ProgramId, Request, SamplingParams, WorkerId, new_request_id, token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import InputError
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from tests.fakes import FakeRuntime
from tests.global_sched.stories import CPU_TINY
from tests.runtime_ext.emulated.runtimes import config as emulated_config


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the sockets are: nobody else's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"preble_sgl-{os.getuid()}"


@pytest.fixture
def fleet(tiny_model: Path) -> Fleet:
    runtimes = FakeRuntime("a"), FakeRuntime("b")
    return Fleet(runtimes, chat=ChatFormat.load(tiny_model), profile=CPU_TINY, policy="round_robin")


async def test_workers_are_listed_with_what_they_do(fleet: Fleet, directory: Path) -> None:
    asked = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p",
        prompt=token_ids([1, 2, 3]),
        sampling=SamplingParams(max_new_tokens=2),
    )
    async with controlled(fleet) as socket:
        assert socket == directory / f"{os.getpid()}.sock"
        assert directory.stat().st_mode & 0o777 == 0o700
        await fleet.generate(asked)
        first, second = await list_workers()
        assert (first["worker_id"], first["num_finished"], first["pid"]) == ("a", 1, os.getpid())
        assert (second["worker_id"], second["num_finished"]) == ("b", 0)
        assert "hit rate" in await worker_table()
    assert not socket.exists()


async def test_a_worker_is_drained_by_command(fleet: Fleet) -> None:
    async with controlled(fleet):
        await drain_worker("a", None)
        assert fleet.worker_ids == ("b",)
        with pytest.raises(InputError, match="no fleet of yours has a worker a: see `preble-sgl workers`"):
            await drain_worker("a", None)
        with pytest.raises(InputError, match=r"notice_s=-1\.0: must be above 0"):
            await drain_worker("b", -1.0)
        assert fleet.worker_ids == ("b",)


async def test_a_server_is_added_by_command_and_may_come_back_after_a_drain(tiny_model: Path) -> None:
    one = emulated_config(model_path=str(tiny_model))
    async with (
        emulated_runtime(one) as first,
        emulated_runtime(one) as second,
        Fleet.attach([first], model_path=tiny_model) as fleet,
        controlled(fleet),
    ):
        added = await add_worker(second, None, None)
        assert second.endswith(added)
        assert len(fleet.worker_ids) == 2
        with pytest.raises(InputError, match=f"there is a runtime {added} already"):
            await add_worker(second, None, os.getpid())
        await drain_worker(added, None)
        assert len(fleet.worker_ids) == 1
        await add_worker(second, None, None)
        assert len(fleet.worker_ids) == 2


async def test_a_server_that_cannot_be_used_is_refused(tiny_model: Path) -> None:
    one = emulated_config(model_path=str(tiny_model))
    async with (
        emulated_runtime(one) as first,
        emulated_runtime(emulated_config()) as other,
        Fleet.attach([first], model_path=tiny_model) as fleet,
        controlled(fleet),
    ):
        with pytest.raises(InputError, match="the server runs"):
            await add_worker(other, None, None)
        with pytest.raises(InputError, match="no runtime answers"):
            await add_worker("http://127.0.0.1:1", None, None)
        with pytest.raises(InputError, match="0 fleets to choose from"):
            await add_worker(first, None, 1)
        assert len(fleet.worker_ids) == 1


async def test_without_a_fleet_there_is_nothing_to_command(directory: Path) -> None:
    with pytest.raises(InputError, match="no fleet of yours runs here"):
        await list_workers()
    left = directory / "999999999.sock"  # of a process that was killed
    left.touch()
    with pytest.raises(InputError, match="no fleet of yours runs here"):
        await list_workers()
    assert not left.exists()


async def test_a_fleet_that_does_not_answer_is_named(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / f"{os.getpid()}.sock").touch()
    with pytest.raises(InputError, match=f"the fleet of process {os.getpid()} does not answer"):
        await list_workers()


async def test_a_directory_that_others_may_enter_is_refused(fleet: Fleet, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    with pytest.raises(InputError, match="must be a directory that only you may enter"):
        async with controlled(fleet):
            pass


async def test_draining_at_leisure_waits_for_calls_and_places_none(tiny_model: Path) -> None:
    a, b = FakeRuntime("a"), FakeRuntime("b")
    fleet = Fleet((a, b), chat=ChatFormat.load(tiny_model), profile=CPU_TINY, policy="round_robin")
    a.may_finish.clear()
    running = asyncio.create_task(fleet.generate(_request()))
    await a.streaming.wait()
    draining = asyncio.create_task(fleet.drain(WorkerId("a")))
    await fleet.generate(_request())
    await fleet.generate(_request())
    assert (len(b.served), draining.done()) == (2, False)
    a.may_finish.set()
    assert (await running).text == "ab"
    await draining
    assert (len(a.served), fleet.worker_ids) == (1, ("b",))


def _request() -> Request:
    return Request(
        request_id=new_request_id(), program_id=ProgramId("p"), call_path="p", prompt=token_ids([1, 2])
    )
