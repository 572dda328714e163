"""The server's state: who waits, which program runs are open, what was counted. One event loop owns it."""

import asyncio
import time
from collections import deque

from preble_sgl.attempts import Work
from preble_sgl.core import ProgramId, RequestId, RequestRecord
from preble_sgl.errors import DeadlineError
from preble_sgl.fleet import Fleet
from preble_sgl.server.admission import Admission
from preble_sgl.server.front import ServerOptions
from preble_sgl.server.metrics import Metrics
from preble_sgl.server.open_programs import OpenPrograms
from preble_sgl.server.programs import ProgramIds
from preble_sgl.server.tenants import Tenants
from preble_sgl.server.wanted import Wanted

NUM_RECENT = 5000


class Gateway:
    """Carries requests to the fleet's runtimes, whichever process they came to."""

    def __init__(self, fleet: Fleet, tenants: Tenants, options: ServerOptions | None = None) -> None:
        options = options or ServerOptions()
        self.fleet = fleet
        self.tenants = tenants
        self.options = options
        self.program_ids = ProgramIds()
        self.programs = OpenPrograms(fleet, time.monotonic)
        self.admission = Admission(options.max_running, options.max_waiting, time.monotonic)
        self.metrics = Metrics()
        self.recent: deque[RequestRecord] = deque(maxlen=NUM_RECENT)
        self.under_way: dict[RequestId, tuple[ProgramId, float]] = {}
        self.is_closing = False
        fleet.on_record(self._on_record)

    async def carry(self, wanted: Wanted, work: Work) -> None:
        """Wait for a turn, and do `work` where it is placed, in the time that it may take.

        Raises NoWorkerError while no runtime is up, ApiError if too many wait, DeadlineError, and what `work`
        does.
        """
        program_id = self.program_ids.of(wanted.tenant.name, wanted.clue)
        self.fleet.any_runtime()  # a client can do more with an error at once than with a wait for a restart
        request = wanted.request(program_id, self.programs.expected_output_len(program_id))
        self.under_way[request.request_id] = (program_id, self.fleet.now())
        try:
            with self.programs.call(program_id):
                async with asyncio.timeout(wanted.timeout_s), self.admission.turn(wanted.tenant):
                    await self.fleet.run(request, work)
        except TimeoutError:
            raise DeadlineError(f"it took longer than the {wanted.timeout_s:g} s that it may") from None
        finally:
            del self.under_way[request.request_id]

    def on_answer(self, path: str, status: int, tenant: str) -> None:
        """Count an answer, whatever it was."""
        self.metrics.on_answer(path, status, tenant)

    def close(self) -> bool:
        """Be no longer ready, and begin no program runs."""
        self.is_closing = True
        self.fleet.close_to_programs()
        return True

    def _on_record(self, record: RequestRecord) -> None:
        self.recent.append(record)
        self.metrics.on_record(record)
