"""Program runs that clients announced, and that nobody may forget for ever when a client dies."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from preble_sgl.core import PlanHint, ProgramId
from preble_sgl.errors import UnknownIdError
from preble_sgl.fleet import Fleet

IDLE_S = 600.0
"""Without a call for so long a program run is taken to be over."""
COMPLETE_IDLE_S = 30.0
"""The same once it has made as many calls as it was going to."""
SWEEP_S = 10.0


@dataclass(slots=True)
class _Open:
    used_at: float
    num_calls_left: int | None
    output_tokens: int | None
    num_running: int = 0


@dataclass(slots=True)
class OpenPrograms:
    """The announced program runs and when each last made a call."""

    fleet: Fleet
    clock: Callable[[], float]
    idle_s: float = IDLE_S
    _open: dict[ProgramId, _Open] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, hint: PlanHint, *, num_calls: int | None = None, output_tokens: int | None = None
    ) -> None:
        """Announce a program run that will make `num_calls` calls, of `output_tokens` each.

        Raises InputError if it is known, NoWorkerError if the server ends.
        """
        self.fleet.begin_program(hint)
        self._open[hint.program_id] = _Open(self.clock(), num_calls, output_tokens)

    def end(self, program_id: ProgramId) -> None:
        """Let go of a program run. Raises UnknownIdError."""
        self.require(program_id)
        del self._open[program_id]
        self.fleet.end_program(program_id)

    def expected_output_len(self, program_id: ProgramId) -> int | None:
        """Return how many tokens a call of a program run is expected to generate; None: nobody knows."""
        one = self._open.get(program_id)
        return one.output_tokens if one else None

    @contextmanager
    def call(self, program_id: ProgramId) -> Iterator[None]:
        """Note that a program run makes a call for as long as the context lasts."""
        one = self._open.get(program_id)
        if one is None:
            yield
            return
        one.num_running += 1
        try:
            yield
        finally:
            one.num_running -= 1
            one.num_calls_left = None if one.num_calls_left is None else one.num_calls_left - 1
            one.used_at = self.clock()

    def touch(self, program_id: ProgramId, *, for_s: float = 0.0) -> None:
        """Note that a program run is alive, and will be without a call for `for_s`."""
        if one := self._open.get(program_id):
            one.used_at = self.clock() + for_s

    def require(self, program_id: ProgramId) -> None:
        """Raise UnknownIdError unless a program run is open."""
        if program_id not in self._open:
            raise UnknownIdError("no such program is open")

    async def sweep(self) -> None:
        """End the idle ones, for as long as this runs."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.clock()
            for program_id in [name for name, one in self._open.items() if self._is_over(one, now)]:
                self.end(program_id)

    def _is_over(self, one: _Open, now: float) -> bool:
        is_complete = one.num_calls_left is not None and one.num_calls_left <= 0
        idle_s = min(COMPLETE_IDLE_S, self.idle_s) if is_complete else self.idle_s
        return not one.num_running and now - one.used_at > idle_s
