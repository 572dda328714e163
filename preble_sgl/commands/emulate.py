"""`preble-sgl emulate`: emulated runtimes, one process each, until the command is ended."""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from preble_sgl.errors import InputError
from preble_sgl.profiles import Profile, load_profile
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig, KvEventsConfig
from preble_sgl.runtime_ext.emulated.launch import EmulatedProcess, launch_emulated
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.wait_queue import WaitOrder

FIRST_PORT = 31001
EVENTS_OFFSET, REPLAY_OFFSET = 1000, 2000
"""From a runtime's port to those of its cache events and their replay."""
PUBLISH_EVERY = 40
LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulated:
    """What to serve. The runtimes listen on `port` and the ports after it. Raises InputError if bad."""

    profile: Profile
    runtimes: int
    port: int
    model_path: Path | None
    order: WaitOrder
    page_size: int
    kv_events: bool

    @classmethod
    def checked(
        cls,
        profile: str,
        *,
        runtimes: int,
        port: int = FIRST_PORT,
        model_path: Path | None = None,
        order: str = "lpm",
        page_size: int = 1,
        kv_events: bool = False,
    ) -> "Emulated":
        """Return it with the profile loaded. Raises InputError for what cannot be served."""
        if runtimes < 1:
            raise InputError(f"{runtimes} runtimes asked for: at least 1 is needed")
        if not 0 < port <= LAST_PORT - REPLAY_OFFSET - runtimes:
            raise InputError(f"port {port}: give one from 1 to {LAST_PORT - REPLAY_OFFSET - runtimes}")
        if order not in get_args(WaitOrder):
            raise InputError(f"there is no order {order}: give one of {', '.join(get_args(WaitOrder))}")
        return cls(
            profile=load_profile(profile),
            runtimes=runtimes,
            port=port,
            model_path=model_path,
            order=cast(WaitOrder, order),
            page_size=page_size,
            kv_events=kv_events,
        )

    @property
    def ports(self) -> Sequence[int]:
        """Where the runtimes listen."""
        return range(self.port, self.port + self.runtimes)

    def config(self, port: int) -> EmulatedConfig:
        """Return the runtime that listens on `port`."""
        profile = self.profile
        return EmulatedConfig(
            engine=EngineConfig(
                step=profile.step,
                kv_tokens=profile.kv_tokens,
                chunk_tokens=profile.chunk_tokens,
                page_size=self.page_size,
                order=self.order,
                publish_every=PUBLISH_EVERY if self.kv_events else None,
            ),
            profile=profile.name,
            overhead_s=profile.overhead_s,
            model_path=str(self.model_path) if self.model_path else None,
            kv_events=_events(port) if self.kv_events else None,
        )


async def serve_emulated(emulated: Emulated) -> None:
    """Serve until SIGINT or SIGTERM. Raises InputError, LaunchError, or RuntimeLost if a runtime ends."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    configs = [emulated.config(port) for port in emulated.ports]
    async with launch_emulated(configs, emulated.ports) as running:
        print("\n".join(_announcement(emulated, running)), flush=True)
        await _wait_any(stop, running)


def _events(port: int) -> KvEventsConfig:
    return KvEventsConfig(
        publisher="zmq",
        endpoint=f"tcp://127.0.0.1:{port + EVENTS_OFFSET}",
        replay_endpoint=f"tcp://127.0.0.1:{port + REPLAY_OFFSET}",
        bind=True,
    )


def _announcement(emulated: Emulated, running: Sequence[EmulatedProcess]) -> Iterator[str]:
    profile = emulated.profile
    yield f"{len(running)} emulated runtimes of {profile.model} on {profile.hardware} ({profile.name}):"
    for port, one in zip(emulated.ports, running, strict=True):
        events = _events(port)
        told = f"  cache events {events.endpoint}, replay {events.replay_endpoint}"
        yield one.url + (told if emulated.kv_events else "")
    yield f"These are emulated timings ({profile.kind}), not measurements of a GPU. Ctrl-C ends them."


async def _wait_any(stop: asyncio.Event, running: Sequence[EmulatedProcess]) -> None:
    """Wait for the signal to stop, or for a runtime that ends by itself."""
    waits = [asyncio.create_task(stop.wait()), *(asyncio.create_task(one.wait_lost()) for one in running)]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
