"""In a front process: requests are carried by what the process with the scheduler says of them."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import aiohttp

from preble_sgl.attempts import Outcome
from preble_sgl.core import Placement, ProgramId, RequestId, WorkerId
from preble_sgl.errors import NoWorkerError, RuntimeFaulty, RuntimeLost
from preble_sgl.runtime_ext.client import forwarded, open_session
from preble_sgl.runtime_ext.protocol import Upstream
from preble_sgl.server.channel import (
    Answered,
    Asked,
    Begun,
    Broke,
    Channel,
    Done,
    FromFront,
    Gone,
    Over,
    Placed,
    Stopped,
    ToFront,
)
from preble_sgl.server.errors import ApiError
from preble_sgl.server.relay import Refused, Relay
from preble_sgl.server.wanted import Wanted

Tell = Callable[[FromFront], None]


class RemoteCarrier:
    """The requests of a front process, and its connections to runtimes."""

    def __init__(self, connections: AsyncExitStack, on_lost: Callable[[], None]) -> None:
        self._connections = connections
        self._on_lost = on_lost
        self._carried: dict[RequestId, _Carried] = {}
        self._runtimes: dict[tuple[str, str | None], _Runtime] = {}
        self.channel: Channel[ToFront] = Channel(ToFront, self._on_message, self._on_end)

    async def carry(self, wanted: Wanted, work: Relay) -> None:
        """Have a request placed, as `Gateway.carry` does, and do it here."""
        carried = _Carried(wanted.request_id, work, self.channel.send)
        self._carried[wanted.request_id] = carried
        self.channel.send(Asked(wanted))
        try:
            await carried.over
        except BaseException as error:
            carried.leave(failed=isinstance(error, Refused))
            raise
        finally:
            del self._carried[wanted.request_id]

    def on_answer(self, path: str, status: int, tenant: str) -> None:
        """Have an answer counted."""
        self.channel.send(Answered(path, status, tenant))

    def _on_message(self, channel: Channel[ToFront], message: ToFront) -> None:
        carried = self._carried.get(message.request_id)
        if carried is None:
            return  # it ended while this was on its way
        match message:
            case Placed():
                self._runtime(message, carried)
            case Stopped():
                carried.stop()
            case Over():
                carried.refuse(message)

    def _runtime(self, placed: Placed, carried: "_Carried") -> None:
        runtime = self._runtimes.get((placed.url, placed.api_key))
        if runtime is not None:
            carried.start(_Way.of(placed, runtime, carried.tell))
            return
        carried.open(self._connect(placed, carried))

    async def _connect(self, placed: Placed, carried: "_Carried") -> None:
        """Connect to a runtime that is new to this process, and go on."""
        key = (placed.url, placed.api_key)
        session = await self._connections.enter_async_context(open_session(*key))
        self._runtimes.setdefault(key, _Runtime(session, placed.worker_id))
        carried.start(_Way.of(placed, self._runtimes[key], carried.tell))

    def _on_end(self, channel: Channel[ToFront]) -> None:
        for carried in self._carried.values():
            carried.fail(NoWorkerError("the server ends"))
        self._on_lost()


@dataclass(frozen=True, slots=True)
class _Runtime:
    session: aiohttp.ClientSession
    worker_id: WorkerId

    def forward(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Upstream]:
        return forwarded(self.session, self._lost, method, path, body, headers=headers)

    def _lost(self, why: str) -> RuntimeLost:
        return RuntimeLost(f"runtime {self.worker_id}: {why}", worker_id=self.worker_id)


@dataclass(frozen=True, slots=True)
class _Way:
    """One attempt, as `dispatcher.Attempt` is where the scheduler is."""

    runtime: _Runtime
    placement: Placement
    program_id: ProgramId
    priority: int | None
    kv_hints: dict[str, Any] | None
    first_token_in_s: float
    on_first_token: Callable[[], None]
    assume_first_token: Callable[[], None]
    tells_new_only: bool

    @classmethod
    def of(cls, placed: Placed, runtime: _Runtime, tell: Tell) -> "_Way":
        return cls(
            runtime,
            Placement(placed.request_id, placed.worker_id, placed.matched_len, placed.reason),
            placed.program_id,
            placed.priority,
            placed.kv_hints,
            placed.first_token_in_s,
            on_first_token=_once(lambda: tell(Begun(placed.request_id, assumed=False))),
            assume_first_token=lambda: tell(Begun(placed.request_id, assumed=True)),
            tells_new_only=placed.tells_new_only,
        )


def _once(tell: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls `tell` the first time only."""
    told = False

    def first() -> None:
        nonlocal told
        if not told:
            told = True
            tell()

    return first


@dataclass(slots=True, eq=False)
class _Carried:
    """One request: `over` is done when it is answered or failed, `task` is the attempt under way."""

    request_id: RequestId
    work: Relay
    tell: Tell
    over: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: "asyncio.Task[None] | None" = None
    fault: Exception | None = None
    is_told: bool = False

    def start(self, way: _Way) -> None:
        self.open(self._attempt(way))

    def open(self, work: Any) -> None:
        if not self.over.done():
            self.task = asyncio.create_task(work)

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def refuse(self, over: Over) -> None:
        """End with what the scheduler's process says, or with what the runtime said that failed twice."""
        self.is_told = True
        status = HTTPStatus(over.status)
        error = ApiError(status, over.message, code=over.code, retry_after_s=over.retry_after_s)
        self.fail(self.fault or error)

    def fail(self, error: Exception) -> None:
        if not self.over.done():
            self.over.set_exception(error)

    def leave(self, *, failed: bool) -> None:
        """Let go of a request that is not answered."""
        self.stop()
        if not self.is_told:
            self.tell(Gone(self.request_id, failed))

    async def _attempt(self, way: _Way) -> None:
        self.fault = None
        try:
            outcome = await self.work.run(way)
        except (RuntimeLost, RuntimeFaulty) as error:
            self.fault = error if isinstance(error, RuntimeFaulty) else None
            faulty = isinstance(error, RuntimeFaulty)
            self.tell(Broke(self.request_id, faulty, str(error), self.work.num_tokens))
        except Exception as error:
            self.fail(error)
        else:
            self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        usage = outcome.usage
        self.tell(Done(self.request_id, usage.cached_tokens, usage.output_tokens, outcome.finish_reason))
        if not self.over.done():
            self.over.set_result(None)
