"""Time that passes only when nothing is left to do: what happens next is what comes first."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol


class Timer(Protocol):
    """Something that is to happen."""

    def cancel(self) -> None:
        """Do not let it happen."""
        ...


class Clock(Protocol):
    """What simulated things ask for the time. An asyncio loop is one, too."""

    def time(self) -> float:
        """Return the instant, in seconds."""
        ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Let something happen at an instant."""
        ...


class _Event:
    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None


class VirtualTime:
    """A clock that jumps from event to event. Events of one instant happen in the order they were made."""

    def __init__(self) -> None:
        self._now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, _Event]] = []

    def time(self) -> float:
        """Return the instant, in seconds since the start."""
        return self._now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Let something happen at an instant that is not over. O(log events)."""
        assert when >= self._now, "time does not run backwards"
        event = _Event(callback, args)
        heapq.heappush(self._events, (when, next(self._numbers), event))
        return event

    def run(self) -> None:
        """Let everything happen until nothing is left."""
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            if event.callback is not None:
                event.callback(*event.args)
