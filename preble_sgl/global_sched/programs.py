"""Programs as the scheduler sees them: which are open, where, and what room they were promised.

A program is *open* on a worker from its first request there until it ends: a planned one until it is
released, any other one while it has unfinished requests. An open program holds a promise of KV room on its
worker: what its plan says it needs or, if that is not known, what its unfinished requests need.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from preble_sgl.core import PlanHint, ProgramId, RequestId, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.bindings import Queued
from preble_sgl.global_sched.node import Node, ancestors


@dataclass(slots=True, eq=False)
class ProgramRun:
    """One program. `number`: order of arrival.

    `promised`: KV tokens per worker on which it is open. `in_line`: requests that wait for it to be opened.
    `expected`: the end of the prefix that it is known to use again.
    """

    program_id: ProgramId
    number: int
    plan: PlanHint | None = None
    num_unfinished: int = 0
    promised: dict[WorkerId, int] = field(default_factory=dict)
    released: bool = False
    in_line: dict[RequestId, Queued] = field(default_factory=dict)
    expected: Node | None = None

    @property
    def is_open(self) -> bool:
        """Whether some worker has opened it."""
        return bool(self.promised)

    @property
    def planned_tokens(self) -> int | None:
        """The KV tokens that its plan says it needs; None when there is no plan or it does not say."""
        return self.plan.kv_tokens if self.plan else None

    def usual_len(self, queued: Queued) -> int:
        """Return the KV tokens that it holds on average between its calls.

        It grows from its first prompt to its widest. One that ends with its first call holds nothing.
        """
        assert self.planned_tokens is not None
        prompt_len = len(queued.request.prompt)
        if self.planned_tokens <= prompt_len + queued.request.sampling.max_new_tokens:
            return 0
        return (prompt_len + self.planned_tokens) // 2

    @property
    def deadline_at(self) -> float:
        """When it should have ended; infinity when nobody said."""
        return self.plan.deadline_at if self.plan and self.plan.deadline_at is not None else float("inf")

    @property
    def is_over(self) -> bool:
        """Whether nothing more is expected of it."""
        return not self.num_unfinished and (self.plan is None or self.released)


@dataclass(slots=True, eq=False)
class Usage:
    """What programs have of one worker: how many are open there, and the KV tokens they were promised."""

    num_open: int = 0
    promised_len: int = 0


class Programs:
    """The programs that are planned or have unfinished requests, and what they have of each worker.

    `usage`, `promised_len` (over all workers) and `num_open` are for others to read only.
    """

    def __init__(self) -> None:
        self._runs: dict[ProgramId, ProgramRun] = {}
        self._num_seen = 0
        self.usage: defaultdict[WorkerId, Usage] = defaultdict(Usage)
        self.num_open = 0
        self.promised_len = 0

    def __iter__(self) -> Iterator[ProgramRun]:
        return iter(self._runs.values())

    def __getitem__(self, program_id: ProgramId) -> ProgramRun:
        return self._runs[program_id]

    def register(self, plan: PlanHint) -> None:
        """Learn a program's plan before its first request. Raises InputError if it is under way."""
        if plan.program_id in self._runs:
            raise InputError(f"program {plan.program_id} is under way: a plan comes before its first request")
        self._add(plan.program_id).plan = plan

    def enter(self, program_id: ProgramId) -> ProgramRun:
        """Count a new request. Raises InputError for a planned program that was released."""
        run = self._runs.get(program_id) or self._add(program_id)
        if run.released:
            raise InputError(f"program {program_id} was released: it can make no more calls")
        run.num_unfinished += 1
        return run

    def leave(self, program_id: ProgramId) -> None:
        """Count a request that is over."""
        run = self._runs[program_id]
        run.num_unfinished -= 1
        self._forget_if_over(run)

    def release(self, program_id: ProgramId) -> None:
        """End a planned program once its last request is over. Raises UnknownIdError."""
        run = self.planned(program_id)
        run.released = True
        self._forget_if_over(run)

    def planned(self, program_id: ProgramId) -> ProgramRun:
        """Return a planned program that is not released. Raises UnknownIdError."""
        run = self._runs.get(program_id)
        if run is None or run.plan is None or run.released:
            raise UnknownIdError(f"program {program_id} has no plan, or is already released")
        return run

    def promise(self, run: ProgramRun, worker_id: WorkerId, num_tokens: int) -> None:
        """Promise a program room on a worker, and open it there; negative takes a promise back."""
        usage = self.usage[worker_id]
        if worker_id not in run.promised:
            self.num_open += not run.is_open
            run.promised[worker_id] = 0
            usage.num_open += 1
        run.promised[worker_id] += num_tokens
        usage.promised_len += num_tokens
        self.promised_len += num_tokens

    def expect(self, run: ProgramRun, tail: Node | None) -> None:
        """Mark a node and all in front of it as what a program will use again, instead of what was before.

        Splits pass the mark on, so it is taken back along the path as it is then.
        """
        for node in ancestors(run.expected) if run.expected else ():
            node.expected -= 1
        for node in ancestors(tail) if tail else ():
            node.expected += 1
        run.expected = tail

    def give_back(self, run: ProgramRun, num_tokens: int) -> None:
        """Promise a program less, wherever it is open."""
        for worker_id, promised in run.promised.items():
            self.promise(run, worker_id, -min(promised, num_tokens))

    def close(self, run: ProgramRun, worker_id: WorkerId) -> None:
        """Take back what a program was promised on a worker; fine if it is not open there."""
        num_tokens = run.promised.pop(worker_id, None)
        if num_tokens is not None:
            usage = self.usage[worker_id]
            usage.promised_len -= num_tokens
            self.promised_len -= num_tokens
            usage.num_open -= 1
            self.num_open -= not run.is_open

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Close every program on a worker that is gone. O(programs)."""
        for run in self._runs.values():
            self.close(run, worker_id)
        self.usage.pop(worker_id, None)

    def check_invariants(self) -> None:
        """Assert that the sums are the sums over the programs. O(programs)."""
        for worker_id, usage in self.usage.items():
            holders = [run for run in self._runs.values() if worker_id in run.promised]
            assert usage.promised_len == sum(run.promised[worker_id] for run in holders)
            assert usage.num_open == len(holders)
        ends = [run.expected for run in self._runs.values() if run.expected]
        for node, num_runs in Counter(node for end in ends for node in ancestors(end)).items():
            assert node.expected == num_runs
        assert self.promised_len == sum(usage.promised_len for usage in self.usage.values())
        assert self.num_open == sum(run.is_open for run in self._runs.values())
        assert not any(run.is_over for run in self._runs.values())

    def _add(self, program_id: ProgramId) -> ProgramRun:
        run = self._runs[program_id] = ProgramRun(program_id, self._num_seen)
        self._num_seen += 1
        return run

    def _forget_if_over(self, run: ProgramRun) -> None:
        if run.is_over:
            for worker_id in list(run.promised):
                self.close(run, worker_id)
            self.expect(run, None)
            del self._runs[run.program_id]
