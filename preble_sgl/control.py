"""Commands to a fleet that runs in another process of the same user: list its workers, drain or add one.

The process with the fleet listens on a Unix socket in a directory that only this user may enter, so there is
no port and no password.
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, RuntimeLost, UnknownIdError
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.supervisor import AttachSpec

CONNECT_TIMEOUT_S = 5.0


@asynccontextmanager
async def controlled(fleet: Fleet) -> AsyncIterator[Path]:
    """Take commands to a fleet for as long as the context lasts. Yields the socket."""
    socket = _directory() / f"{os.getpid()}.sock"
    socket.unlink(missing_ok=True)
    runner = web.AppRunner(_app(fleet))
    await runner.setup()
    try:
        await web.UnixSite(runner, socket).start()
        yield socket
    finally:
        await runner.cleanup()
        socket.unlink(missing_ok=True)


async def list_workers() -> list[dict[str, Any]]:
    """Return the workers of every fleet of this user. Raises InputError if there is none."""
    workers = []
    for socket in _sockets():
        workers += await _ask(socket, "GET", "/workers")
    return workers


async def drain_worker(worker_id: str, notice_s: float | None) -> None:
    """Drain a worker and wait until it is gone. Raises InputError if no fleet has it, or it drains."""
    found = [socket for socket in _sockets() if worker_id in await _names(socket)]
    if not found:
        raise InputError(f"no fleet of yours has a worker {worker_id}: see `preble-sgl workers`")
    if len(found) > 1:
        raise InputError(f"{len(found)} fleets of yours have a worker {worker_id}: give them other names")
    await _ask(found[0], "POST", "/drain", {"worker_id": worker_id, "notice_s": notice_s})


async def add_worker(url: str, api_key: str | None, process: int | None) -> str:
    """Let a fleet use one more server; return its worker's id.

    Raises InputError if it cannot, or if several fleets run and none is said.
    """
    sockets = [socket for socket in _sockets() if process is None or socket.stem == str(process)]
    if len(sockets) != 1:
        raise InputError(
            f"{len(sockets)} fleets to choose from: give --process, as `preble-sgl workers` shows"
        )
    added: str = await _ask(sockets[0], "POST", "/add", {"url": url, "api_key": api_key})
    return added


def _app(fleet: Fleet) -> web.Application:
    async def workers(request: web.Request) -> web.Response:
        found = [{"pid": os.getpid(), **worker} for worker in fleet.describe_workers()]
        return web.Response(body=orjson.dumps(found))

    async def drain(request: web.Request) -> web.Response:
        wanted = orjson.loads(await request.read())
        try:
            await fleet.drain(WorkerId(wanted["worker_id"]), notice_s=wanted["notice_s"])
        except (InputError, UnknownIdError) as error:
            return web.Response(status=400, body=orjson.dumps(str(error)))
        return web.Response(body=b"null")

    async def add(request: web.Request) -> web.Response:
        wanted = orjson.loads(await request.read())
        try:
            added = await fleet.add(AttachSpec(url=wanted["url"], api_key=wanted["api_key"]))
        except (InputError, RuntimeLost) as error:
            return web.Response(status=400, body=orjson.dumps(str(error)))
        return web.Response(body=orjson.dumps(added))

    app = web.Application()
    app.add_routes([web.get("/workers", workers), web.post("/drain", drain), web.post("/add", add)])
    return app


def _directory() -> Path:
    """Return where this user's sockets are. Raises InputError if it is somebody else's."""
    directory = Path(tempfile.gettempdir()) / f"preble_sgl-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f"{directory} must be a directory that only you may enter: remove it")
    return directory


def _sockets() -> list[Path]:
    """Return the sockets of fleets that run; what a killed process left is removed."""
    found = []
    for socket in sorted(_directory().glob("*.sock")):
        if Path(f"/proc/{socket.stem}").exists():
            found.append(socket)
        else:
            socket.unlink(missing_ok=True)
    if not found:
        raise InputError("no fleet of yours runs here: start one with `preble-sgl run`")
    return found


async def _names(socket: Path) -> list[str]:
    return [worker["worker_id"] for worker in await _ask(socket, "GET", "/workers")]


async def _ask(socket: Path, method: str, path: str, body: Any = None) -> Any:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)), timeout=timeout) as session,
            session.request(method, f"http://fleet{path}", data=orjson.dumps(body)) as response,
        ):
            answer = orjson.loads(await response.read())
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"the fleet of process {socket.stem} does not answer: {error}") from error
    if response.status != 200:
        raise InputError(str(answer))
    return answer
