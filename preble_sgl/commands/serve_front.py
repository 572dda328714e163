"""One front process: its settings come on standard input, and it ends with the scheduler's process.

python -m preble_sgl.commands.serve_front
"""

import asyncio
import gc
import sys
from contextlib import AsyncExitStack

import uvloop

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.runtime_ext.tasks import running
from preble_sgl.server.access_log import write_to_stderr
from preble_sgl.server.app import FrontDoor
from preble_sgl.server.channel import Ready
from preble_sgl.server.front import Front
from preble_sgl.server.front_processes import CALLS, REST, FrontConfig, reserve
from preble_sgl.server.passed_on import PassedOn
from preble_sgl.server.prompts import Prompts
from preble_sgl.server.remote_carrier import RemoteCarrier
from preble_sgl.server.serve import Server, make_server
from preble_sgl.server.tenants import Tenants
from preble_sgl.server.traces import Traces


async def run(config: FrontConfig) -> None:
    """Serve until told to end."""
    ended = asyncio.Event()
    async with AsyncExitStack() as connections:
        carrier = RemoteCarrier(connections, ended.set)
        rest = await connections.enter_async_context(
            PassedOn.to(config.directory / REST, config.options.limits)
        )
        prompts = Prompts(ChatFormat.load(config.model_path))
        front = Front(carrier, prompts, Tenants.load(config.keys), config.options, Traces.of_environment())
        server = make_server(FrontDoor(front, rest), config.listening, lambda: True, lifespan="off")
        path = str(config.directory / CALLS)
        await asyncio.get_running_loop().create_unix_connection(lambda: carrier.channel, path)
        with reserve(config.listening) as listening:
            async with running(_announce(server, carrier)), running(_end_with(ended, server)):
                await server.serve(sockets=[listening])


async def _announce(server: Server, carrier: RemoteCarrier) -> None:
    await server.wait_started()
    carrier.channel.send(Ready())


async def _end_with(ended: asyncio.Event, server: Server) -> None:
    await ended.wait()
    server.should_exit = server.force_exit = True


if __name__ == "__main__":
    gc.set_threshold(*GC_THRESHOLDS)
    settings = FrontConfig.decode(sys.stdin.buffer.read())
    if settings.access_log:
        write_to_stderr()
    uvloop.run(run(settings))
