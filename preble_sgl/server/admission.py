"""How many requests are under way, and whose turn it is when more want to be.

Waiting requests stand in one line per tenant, and the lines take turns, so that a tenant with many requests
delays another by one at most. What finds too many waiting is refused at once, with when to come again.
"""

import asyncio
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from preble_sgl.server.errors import ApiError
from preble_sgl.server.tenants import Tenant

LONGEST_RETRY_S = 60
_MEMORY = 0.9


class Admission:
    """At most `max_running` requests at a time and `max_waiting` that wait for their turn."""

    def __init__(self, max_running: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._lines: OrderedDict[Tenant, deque[asyncio.Future[None]]] = OrderedDict()
        self._between_ends_s = 0.0
        self._ended_at: float | None = None

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(len(line) for line in self._lines.values())

    @asynccontextmanager
    async def turn(self, tenant: Tenant) -> AsyncIterator[None]:
        """Wait for a turn and have it while the context lasts. Raises ApiError (429) if too many wait."""
        if not self._lines and self._may_run(tenant):
            self._running[tenant.name] += 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._leave(tenant)

    async def _wait(self, tenant: Tenant) -> None:
        if self.num_waiting >= self._max_waiting:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self._max_waiting} requests wait already: come again later",
                code="queue_full",
                retry_after_s=self.retry_after_s(),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        self._call_next()
        try:
            await turn
        except asyncio.CancelledError:
            self._give_up(tenant, turn)
            raise

    def _give_up(self, tenant: Tenant, turn: "asyncio.Future[None]") -> None:
        if turn.done() and not turn.cancelled():  # its turn had just come
            self._leave(tenant)
            return
        line = self._lines[tenant]
        line.remove(turn)
        if not line:
            del self._lines[tenant]

    def retry_after_s(self) -> int:
        """Return when a place in the line is likely to be free, in whole seconds: as fast as requests end."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._between_ends_s)))

    def _may_run(self, tenant: Tenant) -> bool:
        has_room = self.num_running < self._max_running
        return has_room and (tenant.max_running is None or self._running[tenant.name] < tenant.max_running)

    def _leave(self, tenant: Tenant) -> None:
        now = self._clock()
        if self._ended_at is not None:
            newest = (1 - _MEMORY) * (now - self._ended_at)
            self._between_ends_s = _MEMORY * self._between_ends_s + newest
        self._ended_at = now
        self._running[tenant.name] -= 1
        if not self._running[tenant.name]:
            del self._running[tenant.name]
        self._call_next()

    def _call_next(self) -> None:
        """Give turns to the first of each line in rotation, as long as there is room."""
        while tenant := next((one for one in self._lines if self._may_run(one)), None):
            line = self._lines.pop(tenant)
            turn = line.popleft()
            if line:
                self._lines[tenant] = line  # behind the other lines
            if not turn.cancelled():
                self._running[tenant.name] += 1
                turn.set_result(None)
