"""Start emulated runtimes as processes of their own, and end them with this one, however it ends."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio
import orjson

from preble_sgl.errors import InputError, LaunchError, RuntimeLost
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig

GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class EmulatedProcess:
    """One emulated runtime that runs."""

    url: str
    process: Process

    async def wait_lost(self) -> None:
        """Wait until it ends by itself, and raise RuntimeLost."""
        status = await self.process.wait()
        raise RuntimeLost(f"the emulated runtime at {self.url} ended with status {status}")


@asynccontextmanager
async def launch_emulated(
    configs: Sequence[EmulatedConfig], ports: Sequence[int]
) -> AsyncIterator[list[EmulatedProcess]]:
    """Start one process per configuration and end them all at the end. Port 0 stands for a free one.

    They also end when this process dies: each watches the pipe that is its standard input.
    Raises InputError or LaunchError with what a runtime says that cannot start; then none is left.
    """
    async with AsyncExitStack() as stack:
        # All are started before the first is waited for: they come up side by side.
        processes = [
            await stack.enter_async_context(_process(config, port))
            for config, port in zip(configs, ports, strict=True)
        ]
        yield [EmulatedProcess(await _url(process), process) for process in processes]


@asynccontextmanager
async def _process(config: EmulatedConfig, port: int) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "preble_sgl.runtime_ext.emulated", str(port)),
        stdin=PIPE,
        stdout=PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end them in order
    )
    assert process.stdin is not None
    try:
        process.stdin.write(config.to_json() + b"\n")
        yield process
    finally:
        process.stdin.close()
        with anyio.CancelScope(shield=True):
            await _wait_gone(process)


async def _wait_gone(process: Process) -> None:
    with anyio.move_on_after(GRACE_S):
        await process.wait()
        return
    process.kill()
    await process.wait()


async def _url(process: Process) -> str:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise LaunchError(f"an emulated runtime ended with status {await process.wait()} at its start")
    message = orjson.loads(line)
    if "error" in message:
        raise InputError(message["error"])
    return str(message["url"])
