"""Keep runtimes running: notice that one died or hangs, end it, start it again, and tell who uses them.

                  ┌───────────── up ◄─────────────┐
    first start ──┤              │ died, hangs    │ ready again
                  │              ▼                │
                  │            down ── backoff ───┘
                  │              └── too many failures ──► given up
                  └── drained ──► gone

A server that we only attached to is not ours to start: it is looked for until it answers again. *Hanging* is
not answering `/ready` a few times in a row, or a scheduler process that has reported nothing for long: SGLang
publishes its load with every prefill, every few decode steps and when idle.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import anyio
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_random_exponential,
)

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, PrebleError, RequestRejected, RuntimeLost, UnknownIdError
from preble_sgl.runtime_ext.client import SglangRuntime, default_worker_id
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, check_specs, require_distinct
from preble_sgl.runtime_ext.launched_process import LaunchedProcess
from preble_sgl.runtime_ext.ports import choose_ports, free_ports
from preble_sgl.runtime_ext.tasks import cancel_all

log = logging.getLogger("preble_sgl")

LONGEST_BACKOFF_S = 60.0
"""Also the longest life after which a death counts as one more failure in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """How closely runtimes are watched.

    Every `poll_s` seconds a runtime is asked for a sign of life, for which it has `timeout_s`; `misses` in a
    row mean that it hangs, as do `stall_s` without a word of its scheduler process (longer than any prefill,
    or a first use of kernels that have to be compiled). A restart waits `backoff_s`, doubling with each
    failure in a row; after `max_failures` it is given up. Calls wait `patience_s` for an attached server.
    """

    poll_s: float = 1.0
    timeout_s: float = 5.0
    misses: int = 3
    stall_s: float = 120.0
    backoff_s: float = 1.0
    max_failures: int = 5
    patience_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachSpec:
    """A server that somebody else runs. `api_key` is sent with every request."""

    url: str
    worker_id: WorkerId | None = None
    api_key: str | None = None

    @property
    def name(self) -> WorkerId:
        """Its worker id: by default its host and port."""
        return self.worker_id or default_worker_id(self.url)


class Listener(Protocol):
    """Who uses the runtimes."""

    def on_runtime_up(self, runtime: SglangRuntime) -> None:
        """Use a runtime, which may have an empty cache, from now on."""
        ...

    def on_runtime_down(self, worker_id: WorkerId, why: str) -> None:
        """Stop using a runtime; it may come back. May be told of one that is down already."""
        ...

    def on_runtime_gone(self, worker_id: WorkerId) -> None:
        """Do not wait for a runtime any longer."""
        ...


class Supervisor:
    """Owns the runtimes of a fleet. Open it with `supervised`."""

    def __init__(self, watching: Watching) -> None:
        self._members: dict[WorkerId, _Member] = {}
        self._watching = watching
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}

    @property
    def runtimes(self) -> tuple[SglangRuntime, ...]:
        """The runtimes that are up, in order."""
        return tuple(member.runtime for member in self._members.values() if member.runtime)

    def adopt(self, member: "_Member") -> None:
        """Own a runtime that is about to come up."""
        self._members[member.worker_id] = member

    async def bring_up(self) -> None:
        """Wait until every runtime is up, side by side. Raises what the first that fails raises."""
        try:
            async with asyncio.TaskGroup() as group:
                for member in self._members.values():
                    group.create_task(member.bring_up())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def watch(self, listener: Listener) -> None:
        """Look after the runtimes from now on, and tell `listener`."""
        for worker_id, member in self._members.items():
            self._tasks[worker_id] = asyncio.create_task(self._keep(member, listener))

    async def add(self, server: AttachSpec, listener: Listener) -> SglangRuntime:
        """Connect to one more server and look after it. Raises InputError or RuntimeLost."""
        if server.name in self._members:
            raise InputError(f"there is a runtime {server.name} already")
        member = _Member(server)
        self.adopt(member)
        try:
            runtime = await member.bring_up()
        except BaseException:
            del self._members[server.name]
            raise
        self._tasks[server.name] = asyncio.create_task(self._keep(member, listener))
        return runtime

    def suspect(self, worker_id: WorkerId) -> None:
        """Test a runtime at once, because a request to it broke off and its user has let go of it.

        The listener is told that it is up if it answers.
        """
        if member := self._members.get(worker_id):
            member.suspected.set()

    async def retire(self, worker_id: WorkerId) -> None:
        """End a runtime, or let an attached one go, for good. Raises UnknownIdError."""
        member = self._members.pop(worker_id, None)
        if member is None:
            raise UnknownIdError(f"there is no runtime {worker_id}")
        if task := self._tasks.pop(worker_id, None):
            await cancel_all([task])
        await member.end()

    async def end(self) -> None:
        """Stop watching and let every runtime go."""
        await cancel_all(self._tasks.values())
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(member.end() for member in self._members.values()))

    async def _keep(self, member: "_Member", listener: Listener) -> None:
        """Look after one runtime until it is given up."""
        try:
            await self._watch_and_restart(member, listener)
        except Exception:
            log.exception("runtime %s is no longer looked after, by a mistake of ours", member.worker_id)
            raise

    async def _watch_and_restart(self, member: "_Member", listener: Listener) -> None:
        clock = asyncio.get_running_loop().time
        num_failures = 0
        while True:
            up_at = clock()
            why = await self._wait_lost(member, listener)
            log.warning("runtime %s is lost: %s", member.worker_id, why)
            listener.on_runtime_down(member.worker_id, why)
            await member.end()
            num_failures = 0 if clock() - up_at > LONGEST_BACKOFF_S else num_failures + 1
            runtime = await self._bring_back(member, listener, num_failures)
            if runtime is None:
                listener.on_runtime_gone(member.worker_id)
                return
            log.warning("runtime %s is up again at %s", member.worker_id, runtime.info.url)
            listener.on_runtime_up(runtime)

    async def _wait_lost(self, member: "_Member", listener: Listener) -> str:
        """Wait until a runtime is lost, and return why."""
        runtime, watching = member.runtime, self._watching
        assert runtime is not None
        num_misses = 0
        while member.is_alive:
            is_suspected = await member.wait_suspected(watching.poll_s)
            silent_s = await self._silent_s(runtime)
            num_misses = num_misses + 1 if silent_s is None else 0
            if num_misses >= watching.misses or (is_suspected and num_misses):
                return f"it did not answer {num_misses} times in a row"
            if silent_s is not None and silent_s > watching.stall_s:
                return f"its scheduler has said nothing for {silent_s:.0f} s"
            if is_suspected:
                listener.on_runtime_up(runtime)
        return "its process ended"

    async def _silent_s(self, runtime: SglangRuntime) -> float | None:
        """Return for how long its scheduler has said nothing; None if it does not answer or is not ready."""
        try:
            async with asyncio.timeout(self._watching.timeout_s):
                return await runtime.silent_s() if await runtime.ready() else None
        except (TimeoutError, RuntimeLost, RequestRejected):
            return None

    async def _bring_back(
        self, member: "_Member", listener: Listener, num_failures: int
    ) -> SglangRuntime | None:
        """Start it again, with a wait that grows with each failure; None if it is given up."""
        watching = self._watching
        patience = asyncio.get_running_loop().call_later(
            watching.patience_s, listener.on_runtime_gone, member.worker_id
        )
        if member.is_ours:
            patience.cancel()
        try:
            await asyncio.sleep(min(LONGEST_BACKOFF_S, watching.backoff_s * (2**num_failures - 1)))
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(watching.max_failures) if member.is_ours else stop_never,
                wait=wait_random_exponential(watching.backoff_s, max=LONGEST_BACKOFF_S),
                retry=retry_if_exception_type(PrebleError),
                after=_log_failure,
                reraise=True,
            ):
                with attempt:
                    return await member.bring_up()
        except PrebleError as error:
            log.error("runtime %s is given up: %s", member.worker_id, error)
        finally:
            patience.cancel()
        return None


class _Member:
    """One runtime: how it is brought up and ended, its process if it is ours, and the connection to it."""

    def __init__(self, spec: LaunchSpec | AttachSpec, process: LaunchedProcess | None = None) -> None:
        self._spec = spec
        self._process = process
        self._connection = AsyncExitStack()
        self._ending: asyncio.Task[None] | None = None
        self.runtime: SglangRuntime | None = None
        self.suspected = asyncio.Event()

    @property
    def worker_id(self) -> WorkerId:
        """Its name, also while it is down."""
        return self._spec.worker_id if isinstance(self._spec, LaunchSpec) else self._spec.name

    @property
    def is_ours(self) -> bool:
        """Whether we start and end it."""
        return isinstance(self._spec, LaunchSpec)

    @property
    def is_alive(self) -> bool:
        """Whether its process runs; of a server that is not ours nothing is known."""
        return self._process is None or self._process.is_alive

    async def bring_up(self) -> SglangRuntime:
        """Start it if it is ours, connect to it, and return the connection. Leaves nothing if it raises."""
        if isinstance(self._spec, LaunchSpec) and self._process is None:
            self._process = LaunchedProcess.start_again(self._spec)
        try:
            if self._process:
                await self._process.wait_ready()
            self.runtime = await self._connection.enter_async_context(self._attach())
        except BaseException:
            await self.end()
            raise
        self.suspected.clear()
        return self.runtime

    async def end(self) -> None:
        """End it if it is ours, and the connection. Goes on if cancelled; called again it waits for that."""
        self.runtime = None
        process, self._process = self._process, None
        if process:
            self._ending = asyncio.create_task(process.end())
        await self._connection.aclose()
        if self._ending:
            await asyncio.shield(self._ending)

    async def wait_suspected(self, at_most_s: float) -> bool:
        """Wait for a suspicion, take it back, and return whether there was one."""
        with anyio.move_on_after(at_most_s):
            await self.suspected.wait()
        was_set = self.suspected.is_set()
        self.suspected.clear()
        return was_set

    def _attach(self) -> AbstractAsyncContextManager[SglangRuntime]:
        if self._process:
            return self._process.attach()
        assert isinstance(self._spec, AttachSpec)
        return SglangRuntime.attach(self._spec.url, worker_id=self.worker_id, api_key=self._spec.api_key)


@asynccontextmanager
async def supervised(
    specs: Sequence[LaunchSpec], attach: Sequence[AttachSpec] = (), *, watching: Watching | None = None
) -> AsyncIterator[Supervisor]:
    """Start runtimes and connect to others, side by side, and let them all go at the end.

    Raises InputError, LaunchError or RuntimeLost if one cannot be had at first; then none is left running.
    """
    check_specs(specs)
    require_distinct("name", [*(spec.worker_id for spec in specs), *(spec.name for spec in attach)])
    ports = free_ports({spec.port for spec in specs})
    supervisor = Supervisor(watching or Watching())
    try:
        for spec in specs:
            supervisor.adopt(_Member(spec, LaunchedProcess(spec, choose_ports(spec.port, ports))))
        for server in attach:
            supervisor.adopt(_Member(server))
        await supervisor.bring_up()
        yield supervisor
    finally:
        await supervisor.end()


def _log_failure(state: RetryCallState) -> None:
    assert state.outcome is not None
    log.warning("start %d failed: %s", state.attempt_number, state.outcome.exception())
