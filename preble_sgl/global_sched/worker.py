"""What the global scheduler knows of one worker's load, and of each request's visit to it.

Three kinds of load, all kept as running sums so that reading them costs O(1):

- *backlog*: requests meant for the worker and not bound yet, which may still move;
- *outstanding*: requests bound to the worker and not finished;
- *recent*: every request bound to it within the window H, finished or not. This is E2's W_i(H).

A visit goes through held (waiting here for the request that computes its prefix), prefill (sent, no token
yet), decode and done. Costs in seconds come from the worker's own profile, so workers may differ.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from preble_sgl.core import WorkerId, WorkerLoad
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.eviction import WorkerCache
from preble_sgl.global_sched.node import Node
from preble_sgl.global_sched.snapshot import WorkerSnapshot

Phase = Literal["held", "prefill", "decode", "done"]

OUTPUT_LEN_PRIOR = 45
"""Output length assumed until one is seen: the default of Preble's scheduler."""

MIN_REPORTS = 4
"""Reports of a runtime's load in a row that must show requests of others before they are believed."""

MIN_OUTPUTS = 8
"""Outputs a worker must have shown before its own average is believed over the fleet's."""


@dataclass(slots=True)
class OutputLengths:
    """Observed output lengths, as a sum, a count and a mean: a prior until one is seen."""

    total: int = 0
    num: int = 0
    mean: float = OUTPUT_LEN_PRIOR

    def add(self, output_len: int) -> None:
        """Count one more."""
        self.total += output_len
        self.num += 1
        self.mean = self.total / self.num

    def remove(self, output_len: int) -> None:
        """Take one back."""
        self.total -= output_len
        self.num -= 1
        self.mean = self.total / self.num if self.num else OUTPUT_LEN_PRIOR


@dataclass(slots=True, eq=False)
class Visit:
    """One request's stay on one worker. `missed_len`: prompt tokens it has to prefill there, at `prefill_s`.

    `is_recent`: it counts in the window. `is_overdue`: its time in the window is over but it is not done, so
    it goes on counting.
    """

    number: int
    bound_at: float
    worker: "Worker"
    tail: Node
    prompt_len: int
    missed_len: int = 0
    prefill_s: float = 0.0
    phase: Phase = "held"
    output_len: int | None = None
    is_recent: bool = True
    is_overdue: bool = False


@dataclass(slots=True, eq=False)
class Worker:
    """The load of one worker. Changed only by the scheduler and its window.

    `num_bound`: unfinished requests, sent or held; `num_foreign`: those that others have its runtime do.
    `prefill_wait_s`: seconds until a prompt arriving now could be prefilled; runtimes prefill first, and in
    batches.
    """

    worker_id: WorkerId
    kv_tokens: int
    page_size: int
    profile: CostProfile
    fleet_outputs: OutputLengths
    cache: WorkerCache
    is_draining: bool = False

    num_held: int = 0
    num_prefill: int = 0
    num_decode: int = 0
    num_bound: int = 0
    pending_prefill_tokens: int = 0
    pending_prefill_s: float = 0.0
    prefill_wait_s: float = 0.0

    backlog_s: float = 0.0
    num_foreign: int = 0
    _left_over: deque[int] = field(default_factory=lambda: deque(maxlen=MIN_REPORTS))

    num_recent: int = 0
    recent_prefill_s: float = 0.0
    outputs: OutputLengths = field(default_factory=OutputLengths)

    num_finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def expected_output_len(self) -> float:
        """The output length to expect of a request: the worker's average in H, the fleet's, or a prior."""
        return self.outputs.mean if self.outputs.num >= MIN_OUTPUTS else self.fleet_outputs.mean

    @property
    def recent_decode_s(self) -> float:
        """Worker seconds of decoding that the requests of the window cause."""
        return self.num_recent * self.profile.decode_s(self.expected_output_len)

    @property
    def recent_s(self) -> float:
        """E2's L_i: worker seconds of the window's requests, `sum PT(missed) + DT(average output)`.

        What others have the runtime do counts as long as it lasts: nobody knows what they did before.
        """
        foreign_s = self.num_foreign * self.profile.decode_s(self.expected_output_len)
        return self.recent_prefill_s + self.recent_decode_s + foreign_s

    @property
    def outstanding_s(self) -> float:
        """Worker seconds of all unfinished requests: prefill not yet done, and one expected output each."""
        num_requests = self.num_bound + self.num_foreign
        return self.pending_prefill_s + num_requests * self.profile.decode_s(self.expected_output_len)

    def on_load(self, load: WorkerLoad) -> None:
        """Learn from a report of the runtime what others than this scheduler have it do.

        Reports lag behind: a request may be counted that is over here, or not yet be counted. So of the last
        MIN_REPORTS the one that leaves least over is believed.
        """
        self._left_over.append(max(0, load.num_requests - self.num_prefill - self.num_decode))
        self.num_foreign = min(self._left_over) if len(self._left_over) == MIN_REPORTS else 0

    def admit(self, visit: Visit, missed_len: int) -> None:
        """Count a visit that starts, held."""
        visit.missed_len = missed_len
        visit.prefill_s = self.profile.prefill_s(missed_len, visit.prompt_len - missed_len)
        self.num_held += 1
        self.num_bound += 1
        self._pend(missed_len, visit.prefill_s)
        self.num_recent += 1
        self.recent_prefill_s += visit.prefill_s

    def reprice(self, visit: Visit, missed_len: int) -> None:
        """Correct how much of its prompt a visit has to prefill."""
        if missed_len == visit.missed_len:
            return
        prefill_s = self.profile.prefill_s(missed_len, visit.prompt_len - missed_len)
        if visit.phase in ("held", "prefill"):
            self._pend(missed_len - visit.missed_len, prefill_s - visit.prefill_s)
        if visit.is_recent:
            self.recent_prefill_s += prefill_s - visit.prefill_s
        visit.missed_len, visit.prefill_s = missed_len, prefill_s

    def move(self, visit: Visit, phase: Phase) -> None:
        """Take a visit to its next phase."""
        self._count(visit.phase, -1)
        self._count(phase, 1)
        if visit.phase in ("held", "prefill") and phase not in ("held", "prefill"):
            self._settle_prefill(visit)
        visit.phase = phase

    def leave_window(self, visit: Visit) -> None:
        """Stop counting a visit as recent."""
        visit.is_recent = False
        self.num_recent -= 1
        self.recent_prefill_s -= visit.prefill_s
        if not self.num_recent:
            self.recent_prefill_s = 0.0  # no rounding error outlives the requests
        if visit.output_len is not None:
            self.outputs.remove(visit.output_len)
            self.fleet_outputs.remove(visit.output_len)

    def finish(self, visit: Visit, cached_tokens: int, output_len: int) -> None:
        """End a visit and learn from it what its runtime reported."""
        self.reprice(visit, visit.prompt_len - cached_tokens)
        self.move(visit, "done")
        self.num_finished += 1
        self.prompt_tokens += visit.prompt_len
        self.cached_tokens += cached_tokens
        self.output_tokens += output_len
        if visit.is_recent:
            visit.output_len = output_len
            self.outputs.add(output_len)
            self.fleet_outputs.add(output_len)

    def snapshot(self, *, used_tokens: int) -> WorkerSnapshot:
        """Return the load as plain values."""
        return WorkerSnapshot(
            worker_id=self.worker_id,
            is_draining=self.is_draining,
            num_held=self.num_held,
            num_prefill=self.num_prefill,
            num_decode=self.num_decode,
            num_foreign=self.num_foreign,
            backlog_s=self.backlog_s,
            pending_prefill_tokens=self.pending_prefill_tokens,
            outstanding_s=self.outstanding_s,
            recent_s=self.recent_s,
            used_tokens=used_tokens,
            kv_tokens=self.kv_tokens,
            num_finished=self.num_finished,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
        )

    def _count(self, phase: Phase, change: int) -> None:
        match phase:
            case "held":
                self.num_held += change
            case "prefill":
                self.num_prefill += change
            case "decode":
                self.num_decode += change
            case "done":
                self.num_bound -= change

    def _pend(self, num_tokens: int, seconds: float) -> None:
        """Add to what waits for prefill; negative to take off."""
        self.pending_prefill_tokens += num_tokens
        self.pending_prefill_s += seconds
        self.prefill_wait_s = self.profile.batch_s(self.pending_prefill_tokens)

    def _settle_prefill(self, visit: Visit) -> None:
        self._pend(-visit.missed_len, -visit.prefill_s)
        if not (self.num_held or self.num_prefill):
            self.pending_prefill_s = 0.0
