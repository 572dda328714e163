"""Several processes that take connections, around one that has the scheduler.

All fronts listen on one port, and the kernel divides connections among them. What is placed they ask for over
one Unix socket and do themselves; every other route is passed on to this process over another.
"""

import asyncio
import logging
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from preble_sgl.errors import InputError, LaunchError
from preble_sgl.runtime_ext.tasks import cancel_all
from preble_sgl.server.app import documented_app
from preble_sgl.server.front import ServerOptions
from preble_sgl.server.front_calls import FrontCalls
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.serve import Listening, make_server

log = logging.getLogger("preble_sgl")

CALLS, REST = "calls.sock", "http.sock"
START_S = 60.0
RESTART_S = 1.0
KILL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """What a front process has to know. `directory`: where the sockets of the scheduler's process are."""

    directory: Path
    model_path: Path
    listening: Listening
    options: ServerOptions
    keys: Path | None
    access_log: bool

    def encode(self) -> bytes:
        """Return it as `decode` reads it."""
        return msgspec.json.encode(self, enc_hook=str)

    @classmethod
    def decode(cls, data: bytes) -> "FrontConfig":
        """Read what `encode` wrote."""
        return msgspec.json.decode(data, type=cls, dec_hook=lambda kind, text: kind(text))


def reserve(listening: Listening) -> socket.socket:
    """Return a socket that keeps the port for fronts. Raises InputError if it is taken."""
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        reserved.bind((listening.host, listening.port))
    except OSError as error:
        reserved.close()
        raise InputError(f"port {listening.port} on {listening.host}: {error.strerror}") from None
    return reserved


class Fronts:
    """The front processes of one server, and its routes that are not placed."""

    def __init__(self, gateway: Gateway, config: FrontConfig) -> None:
        self._gateway = gateway
        self._config = config
        self._encoded = config.encode()
        self._calls = FrontCalls(gateway)
        self._processes: dict[int, Process] = {}
        self._ending: asyncio.Task[None] | None = None
        rest = Listening(drain_s=config.listening.drain_s)
        path = str(config.directory / REST)
        self._rest = make_server(documented_app(gateway), rest, self._on_signal, uds=path)

    async def serve(self, num: int, on_started: Callable[[int], None]) -> None:
        """Keep `num` of them running until a signal to end; `on_started` is told the port.

        Raises LaunchError if they do not start.
        """
        loop = asyncio.get_running_loop()
        path = self._config.directory / CALLS
        async with await loop.create_unix_server(self._calls.accept, path):
            rest = loop.create_task(self._rest.serve())
            keeping = [loop.create_task(self._keep(number)) for number in range(num)]
            try:
                await self._wait_started(num)
                on_started(self._config.listening.port)
                await rest
            finally:
                self._rest.should_exit = True
                await cancel_all(keeping)
                await self._end()

    async def _wait_started(self, num: int) -> None:
        try:
            async with asyncio.timeout(START_S):
                while self._calls.num_ready < num and self._ending is None:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise LaunchError(f"the server's processes did not start in {START_S:g} s") from None

    def _on_signal(self) -> bool:
        """Let the fronts end first, and this process after them; a second signal ends it at once."""
        self._gateway.close()
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end_all())
            return False
        return True

    async def _end_all(self) -> None:
        await self._end()
        self._rest.should_exit = True

    async def _end(self) -> None:
        """Let the fronts finish what they have, for as long as they may."""
        processes = [one for one in self._processes.values() if one.returncode is None]
        for one in processes:
            one.terminate()
        try:
            async with asyncio.timeout(self._config.listening.drain_s + KILL_S):
                await asyncio.gather(*(one.wait() for one in processes))
        except TimeoutError:
            for one in processes:
                if one.returncode is None:
                    one.kill()

    async def _keep(self, number: int) -> None:
        """Start one, and again when it ends by itself."""
        command = (sys.executable, "-m", "preble_sgl.commands.serve_front")
        while self._ending is None:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE)
            self._processes[number] = process
            await process.communicate(self._encoded)
            if self._ending is None:
                log.error("server process %d ended with %s: starting another", number, process.returncode)
                await asyncio.sleep(RESTART_S)


@contextmanager
def fronts(
    gateway: Gateway, listening: Listening, *, model_path: Path, keys: Path | None, access_log: bool
) -> Iterator[Fronts]:
    """Prepare front processes on a port and sockets that are theirs while the context lasts.

    Raises InputError if the port is taken.
    """
    with TemporaryDirectory(prefix="preble_sgl-") as directory, reserve(listening) as reserved:
        config = FrontConfig(
            directory=Path(directory),
            model_path=model_path,
            listening=replace(listening, port=reserved.getsockname()[1]),
            options=gateway.options,
            keys=keys,
            access_log=access_log,
        )
        yield Fronts(gateway, config)
