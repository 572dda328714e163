"""Program runs that clients announced, and that nobody may forget for ever when a client dies."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from preble_sgl.core import PlanHint, ProgramId
from preble_sgl.errors import UnknownIdError
from preble_sgl.fleet import Fleet

IDLE_S = 600.0
"""Without a call for so long a program run is taken to be over."""
SWEEP_S = 10.0


@dataclass(slots=True)
class OpenPrograms:
    """The announced program runs and when each last made a call."""

    fleet: Fleet
    clock: Callable[[], float]
    idle_s: float = IDLE_S
    _used_at: dict[ProgramId, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._used_at)

    def begin(self, hint: PlanHint) -> None:
        """Announce a program run. Raises InputError if it is known, NoWorkerError if the server ends."""
        self.fleet.begin_program(hint)
        self._used_at[hint.program_id] = self.clock()

    def end(self, program_id: ProgramId) -> None:
        """Let go of a program run. Raises UnknownIdError."""
        if program_id not in self._used_at:
            raise UnknownIdError("no such program is open")
        del self._used_at[program_id]
        self.fleet.end_program(program_id)

    def touch(self, program_id: ProgramId, *, for_s: float = 0.0) -> None:
        """Note that a program run is alive, and will be without a call for `for_s`."""
        if program_id in self._used_at:
            self._used_at[program_id] = self.clock() + for_s

    def require(self, program_id: ProgramId) -> None:
        """Raise UnknownIdError unless a program run is open."""
        if program_id not in self._used_at:
            raise UnknownIdError("no such program is open")

    async def sweep(self) -> None:
        """End the idle ones, for as long as this runs."""
        while True:
            await asyncio.sleep(SWEEP_S)
            too_old = self.clock() - self.idle_s
            for program_id in [one for one, used_at in self._used_at.items() if used_at < too_old]:
                self.end(program_id)
