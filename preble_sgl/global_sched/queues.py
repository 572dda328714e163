"""Requests without a worker, and where each of them waits.

    inbox ──► line         its program may not be opened anywhere yet (admission.py)
       └────► backlog      meant for a worker that cannot start it soon; it may still move

A program stands in line as a whole: its first request holds the place, and once that one is let in all the
others are. So no request of an open program ever waits for a program that is not.
Requests that come back from a worker return to the inbox, in the order in which they were submitted.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from preble_sgl.core import RequestId, WorkerId
from preble_sgl.global_sched.backlog import Backlog, Waiting
from preble_sgl.global_sched.bindings import Queued
from preble_sgl.global_sched.programs import ProgramRun
from preble_sgl.global_sched.worker import Worker


class Queues:
    """The inbox, the line for admission, and one backlog per worker."""

    def __init__(self, *, depth_first: bool, short_first: bool) -> None:
        self._depth_first = depth_first
        self._short_first = short_first
        self._inbox: dict[RequestId, Queued] = {}
        self._backlogs: dict[WorkerId, Backlog] = {}
        self._in_line: dict[RequestId, ProgramRun] = {}
        self.line = Backlog(depth_first=depth_first, short_first=short_first)
        self.num_backlogged = 0

    def __contains__(self, request_id: RequestId) -> bool:
        known = request_id in self._inbox or request_id in self._in_line
        return known or (self.num_backlogged > 0 and self.backlog_of(request_id) is not None)

    def __len__(self) -> int:
        return len(self._inbox) + len(self._in_line) + self.num_backlogged

    @property
    def num_waiting(self) -> int:
        """Requests whose program stands in line."""
        return len(self._in_line)

    def put(self, queued: Queued) -> None:
        """Take in a new request."""
        self._inbox[queued.request_id] = queued

    def put_back(self, returned: Iterable[Queued]) -> None:
        """Take requests back from workers."""
        inbox = sorted(chain(self._inbox.values(), returned), key=lambda queued: queued.number)
        self._inbox = {queued.request_id: queued for queued in inbox}

    def inbox(self) -> list[Queued]:
        """Return the new requests in order."""
        return list(self._inbox.values())

    def leave_inbox(self, request_id: RequestId) -> None:
        """Take a request out of the inbox, because it was placed or waits elsewhere now."""
        del self._inbox[request_id]

    def stand_in_line(self, queued: Queued, run: ProgramRun) -> None:
        """Let a request wait until its program may be opened."""
        if not run.in_line:
            self.line.add(_in_line(queued, run))
        run.in_line[queued.request_id] = queued
        self._in_line[queued.request_id] = run

    def leave_line(self, request_id: RequestId) -> Queued:
        """Take a request out of the line; the next of its program, if any, takes its place."""
        run = self._in_line.pop(request_id)
        queued = run.in_line.pop(request_id)
        if request_id in self.line:
            self.line.remove(request_id)
            for successor in list(run.in_line.values())[:1]:
                self.line.add(_in_line(successor, run))
        return queued

    def backlog(self, worker_id: WorkerId) -> Backlog:
        """Return what waits for a worker."""
        if worker_id not in self._backlogs:
            self._backlogs[worker_id] = Backlog(depth_first=self._depth_first, short_first=self._short_first)
        return self._backlogs[worker_id]

    def backlog_of(self, request_id: RequestId) -> WorkerId | None:
        """Return the worker whose backlog a request is in. O(workers)."""
        found = (worker_id for worker_id, backlog in self._backlogs.items() if request_id in backlog)
        return next(found, None)

    def defer(self, waiting: Waiting, worker: Worker) -> None:
        """Let a request wait for room on a worker."""
        backlog = self.backlog(worker.worker_id)
        backlog.add(waiting)
        worker.backlog_s = backlog.work_s
        self.num_backlogged += 1

    def draw(self, request_id: RequestId, worker: Worker) -> Waiting:
        """Take a request out of a worker's backlog."""
        backlog = self.backlog(worker.worker_id)
        waiting = backlog.remove(request_id)
        worker.backlog_s = backlog.work_s
        self.num_backlogged -= 1
        return waiting

    def dissolve(self, worker: Worker) -> None:
        """Put a worker's whole backlog back into the inbox."""
        self.line.forget_worker(worker.worker_id)
        backlog = self._backlogs.pop(worker.worker_id, None)
        if backlog is not None:
            self.num_backlogged -= len(backlog)
            worker.backlog_s = 0.0
            self.put_back(waiting.queued for waiting in backlog)

    def remove(self, request_id: RequestId, workers: dict[WorkerId, Worker]) -> Queued:
        """Take a request out of wherever it waits."""
        if request_id in self._inbox:
            return self._inbox.pop(request_id)
        if request_id in self._in_line:
            return self.leave_line(request_id)
        worker_id = self.backlog_of(request_id)
        assert worker_id is not None, "it waits nowhere"
        return self.draw(request_id, workers[worker_id]).queued

    def check_invariants(self, workers: dict[WorkerId, Worker]) -> None:
        """Assert that nobody waits twice and that the sums agree."""
        numbers = [queued.number for queued in self._inbox.values()]
        assert numbers == sorted(numbers)
        self.line.check_invariants()
        runs = {run.number: run for run in self._in_line.values()}
        places = {waiting.queued.request_id for waiting in self.line}
        assert places == {next(iter(run.in_line)) for run in runs.values()}
        for worker_id, backlog in self._backlogs.items():
            backlog.check_invariants()
            assert worker_id in workers
            assert workers[worker_id].backlog_s == backlog.work_s
        assert self.num_backlogged == sum(map(len, self._backlogs.values()))
        ids = list(self._ids())
        assert len(ids) == len(set(ids)) == len(self)

    def _ids(self) -> Iterator[RequestId]:
        yield from self._inbox
        yield from self._in_line
        for backlog in self._backlogs.values():
            yield from (waiting.queued.request_id for waiting in backlog)


def _in_line(queued: Queued, run: ProgramRun) -> Waiting:
    """Return a request as it stands in line: what it misses there is room."""
    missed_len = len(queued.request.prompt) if run.planned_tokens is None else run.usual_len(queued)
    return Waiting(queued, rank(queued, run), missed_len=missed_len)


def rank(queued: Queued, run: ProgramRun) -> tuple[float, int, int]:
    """Return a request's place in line: earliest deadline, then first program, then first request."""
    return (run.deadline_at, run.number, queued.number)
