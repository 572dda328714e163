"""Which workers may open a program now: a limit on open programs, and room in the KV cache.

This is about programs that come back to what they hold: agents, and branches that join. When they thrash a
KV cache together they finish later than when they wait for each other, so such a program is opened on a
worker only when the cache can hold what it will need beside what was promised before. A worker with nothing
promised takes any program, however large. A program that is open keeps its workers.

A program of one call holds nothing between calls. Runtimes admit calls by themselves, and what waits here is
only torn from those that share its prefix, so it may open anywhere.

What a worker has of a program's prompt, or is about to compute, it needs no new room for: programs over one
document are promised the document once, by the first of them.

A plan tells how wide a program gets at its widest, and its first prompt how wide it begins; it is promised
the mean of the two, for programs that grow reach their widest at different times. Unplanned requests are
promised what they need. Together they may fill the cache. (Promising the widest and filling 60 % of it, the
bound of an earlier study, left agents half of the room they could use, and a batch of documents waiting.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.programs import ProgramRun, Programs, Usage
from preble_sgl.global_sched.worker import Worker

Objective = Literal["latency", "throughput"]

LATENCY_OPEN = 16
"""Open programs per worker under the objective `latency`: fewer at a time, so each one ends sooner.

In simulation this rarely pays beside the other mechanisms: with 8, a batch of documents ends 5 % sooner in
the mean and 14 % later as a whole; agents and short calls, which leave most of a worker idle, end much later.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanisms:
    """What the scheduler does besides asking its policy. Each is a switch, so each can be measured alone.

    `open_limit`: most programs open at a time, in the whole fleet (the `@K` of a policy's name).
    `kv_room`: open a program only where its KV fits. `late_binding`: bind a request when its worker can
    start it soon; until then it may still move. `depth_first`: among waiting requests, those of one prefix
    together. `short_first`: among waiting requests, those that have waited long for the little they miss.
    `decode_gaps`: let decodes end before a long prefill. `stealing`: a worker with room takes what waits for
    another, if it would start there so much sooner.
    `fairness`: tenants take turns by what they were served. `hold_pauses`: keep a paused program's room
    when that is cheaper than computing its KV again. `objective`: `latency` opens few programs per worker.
    """

    open_limit: int | None = None
    kv_room: bool = False
    late_binding: bool = False
    depth_first: bool = False
    short_first: bool = False
    decode_gaps: bool = False
    stealing: bool = False
    fairness: bool = False
    hold_pauses: bool = False
    objective: Objective = "throughput"


PLAIN = Mechanisms()
"""Every request is placed at once."""

PLAN = Mechanisms(
    kv_room=True,
    late_binding=True,
    depth_first=True,
    short_first=True,
    decode_gaps=True,
    stealing=True,
    fairness=True,
    hold_pauses=True,
)
"""What preble_plan runs with."""


class Admission:
    """Decides where a program may be open."""

    def __init__(self, mechanisms: Mechanisms, programs: Programs) -> None:
        self._open_limit = mechanisms.open_limit
        self._kv_room = mechanisms.kv_room
        self._few = mechanisms.objective == "latency"
        self._least_kv_tokens = 0
        self._programs = programs

    @property
    def is_open_to_all(self) -> bool:
        """Whether every program may be opened everywhere, at any time."""
        return not self._kv_room and self._open_limit is None and not self._few

    def use(self, workers: Sequence[Worker]) -> None:
        """Learn which workers there are."""
        self._least_kv_tokens = min((worker.kv_tokens for worker in workers), default=0)

    def allowed(
        self, run: ProgramRun, need_len: int, shared: Mapping[WorkerId, int], workers: Sequence[Worker]
    ) -> Sequence[Worker]:
        """Return the workers where a program is or may be open. O(workers).

        It needs `need_len` tokens, less what a worker has already: `shared`. Nothing needs no room.
        """
        limit = self._open_limit
        if limit is not None and not run.is_open and self._programs.num_open >= limit:
            return ()
        if not self._few and (need_len == 0 or self._fits_anywhere(need_len)):
            return workers
        usage = self._programs.usage
        return [
            worker
            for worker in workers
            if not (used := usage[worker.worker_id]).num_open
            or (
                self._may_open_more(used)
                and self._fits(used, need_len - shared.get(worker.worker_id, 0), worker)
            )
            or worker.worker_id in run.promised
        ]

    def _may_open_more(self, used: Usage) -> bool:
        return not self._few or used.num_open < LATENCY_OPEN

    def _fits_anywhere(self, need_len: int) -> bool:
        """Whether all promises together would fit into the smallest cache: then they do on every worker."""
        return not self._kv_room or self._programs.promised_len + need_len <= self._least_kv_tokens

    def _fits(self, used: Usage, need_len: int, worker: Worker) -> bool:
        return not self._kv_room or used.promised_len + need_len <= worker.kv_tokens
