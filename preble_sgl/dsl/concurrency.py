"""How many rows run side by side: a fixed number, or as many as make the batch faster.

The adaptive limit climbs: it doubles while that raises the tokens served per second, and stays when it no
longer does. A backend that refuses calls because it is full halves it.
"""

import asyncio
from collections import deque
from typing import Any

START = 64
MOST = 1024

BETTER = 1.05
"""More tokens per second by this factor are worth more rows side by side."""


class RowLimit:
    """Lets rows in, at most `limit` at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._num_running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self._num_running >= self.limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn  # whoever wakes us has counted us in
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        else:
            self._num_running += 1

    async def __aexit__(self, *_: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        self._num_running -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._num_running < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_running += 1
                turn.set_result(None)

    def on_row(self, num_tokens: int, now: float) -> None:
        """Learn that a row has ended, and how many tokens its calls had, prompts and outputs."""

    def on_overload(self) -> None:
        """Learn that the backend refused a call because it was full."""


class AdaptiveLimit(RowLimit):
    """Looks at the tokens per second of every `limit` rows, and climbs while they rise."""

    def __init__(self, now: float, start: int = START, most: int = MOST) -> None:
        super().__init__(start)
        self._most = most
        self._begin(now)
        self._best_rate = 0.0

    def _begin(self, now: float) -> None:
        self._num_rows = self._num_tokens = 0
        self._began_at = now

    def on_row(self, num_tokens: int, now: float) -> None:
        """Count a row; look at the rate when as many have ended as run side by side."""
        self._num_rows += 1
        self._num_tokens += num_tokens
        if self._num_rows >= self.limit and now > self._began_at:
            rate = self._num_tokens / (now - self._began_at)
            if rate > BETTER * self._best_rate:
                self._best_rate = rate
                self.limit = min(self._most, 2 * self.limit)
                self._let_in()
            self._begin(now)

    def on_overload(self) -> None:
        """Halve the limit; what was best before counts no more."""
        self.limit = max(1, self.limit // 2)
        self._best_rate = float("inf")
