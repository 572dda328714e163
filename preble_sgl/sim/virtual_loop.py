"""An asyncio loop in virtual time: `asyncio.sleep(60)` takes a minute of it and no time at all.

Programs are coroutines, so simulated programs need a loop; this one never waits. When nothing is ready it
jumps to what comes next. It has no clock, no threads and no sockets of the world's, so it is as deterministic
as the coroutines are; whatever waits for the world outside waits for ever, and is told so.
"""

import asyncio
import selectors
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs coroutines in virtual time, which begins at 0 s."""

    def __init__(self) -> None:
        self._virtual_now = 0.0
        super().__init__(_NeverWaits(self))

    def time(self) -> float:
        """Return the instant, in seconds since the start."""
        return self._virtual_now

    def pass_time(self, seconds: float | None) -> None:
        """Jump ahead. Raises RuntimeError if there is nothing to jump to."""
        if seconds is None:
            raise RuntimeError("everything waits for something that never happens in a simulation")
        self._virtual_now += seconds

    def run_in_executor(self, *args: Any) -> Any:  # type: ignore[override]
        """Refuse: a thread takes time that is not virtual."""
        raise RuntimeError("threads cannot run in virtual time: call the function directly")


class _NeverWaits(selectors.SelectSelector):
    """Lets time pass instead of waiting for files, of which there are none but the loop's own."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._loop.pass_time(timeout)
        return []
