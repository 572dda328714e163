"""Placing: from the queues to a worker, through admission, the policy and late binding.

    for each worker with room:  bind the next of its backlog
    for each request in turn:   workers that may take it (admission) ─► the policy picks one ─► bind it,
                                or let it wait in the backlog of a worker that cannot start it soon
    for each worker with room:  steal from another's backlog

A worker *has room* while less than BIND_AHEAD_LEN tokens wait for prefill on it: enough for its next
iteration, so that it never idles, and no more, so that the rest can still go elsewhere.

Runtimes prefill before they decode, so a steady stream of long prompts would never let the decodes in
between come to their end. *Decode gaps* leave them the time: a prefill that takes longer than the running
requests need to end waits for them, if they lose more by it than those that wait do. In simulated video and
document questions near saturation this is worth a factor of two to four of the mean latency.

Stealing computes again what the owner has, which all that wait pay for: the thief must start a request sooner
by STEAL_MARGIN times the seconds of prefill that are added, or copies drive each other out of the caches.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from operator import attrgetter

from preble_sgl.core import WorkerId, common_prefix_len
from preble_sgl.global_sched.admission import Admission, Mechanisms
from preble_sgl.global_sched.backlog import Turn, Waiting
from preble_sgl.global_sched.bindings import Bindings, Bound, Queued, reusable_len
from preble_sgl.global_sched.fairness import FairShare
from preble_sgl.global_sched.node import TOKEN_BYTES, Match, ancestors
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, Policy
from preble_sgl.global_sched.programs import ProgramRun, Programs
from preble_sgl.global_sched.queues import Queues, rank
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.worker import Worker

BIND_AHEAD_LEN = 8192
"""Tokens that may wait for prefill on a worker: one iteration of SGLang's chunked prefill on a large GPU."""

STEAL_MARGIN = 3.0
"""How many seconds sooner a stolen request has to start for each second of prefill that is done twice."""

PAUSE_WORTH = 10.0
"""A pause may last so many times what computing the KV again takes, before its room is given to others.

Who lets a program in for the time of a pause has it for its whole life, so the paused one stands in line
long after its pause is over. Simulated agents with tool pauses end 1.5 times sooner with 10 than with 1.
"""


class Placer:
    """Moves requests from the queues to workers, one `place` at a time."""

    def __init__(
        self,
        policy: Policy,
        mechanisms: Mechanisms,
        *,
        rng: random.Random,
        tree: RadixTree,
        bindings: Bindings,
        programs: Programs,
        queues: Queues,
        fair: FairShare,
    ) -> None:
        self._policy = policy
        self._mechanisms = mechanisms
        self._admission = Admission(mechanisms, programs)
        self._rng = rng
        self._tree = tree
        self._bindings = bindings
        self._programs = programs
        self._queues = queues
        self._fair = fair
        self._turn: Turn | None = fair.least_served if mechanisms.fairness else None
        self._workers: Sequence[Worker] = ()
        self.may_admit = False

    def use(self, workers: Sequence[Worker]) -> None:
        """Place on these workers from now on."""
        self._workers = workers
        self._admission.use(workers)
        self.may_admit = True

    def place(self, now: float) -> None:
        """Place what can be placed now."""
        if self._queues.num_backlogged:
            self._draw_backlogs(now)
        if self.may_admit:
            self._admit_waiting(now)
        for queued in self._queues.inbox():
            self._place_new(queued, now)
            self._queues.leave_inbox(queued.request_id)  # only now: a policy may raise
        if self._mechanisms.stealing and self._queues.num_backlogged:
            while self._steal(now):
                pass

    def _place_new(self, queued: Queued, now: float) -> None:
        """Place a new request, unless its program has to stand in line."""
        run = self._programs[queued.program_id]
        behind_others = len(self._queues.line) and not run.is_open
        if behind_others or not self._try(queued, run, now):
            self._queues.stand_in_line(queued, run)
            self.may_admit = True
        else:
            self._let_in(run, now)

    def _let_in(self, run: ProgramRun, now: float) -> None:
        """Place what an open program still has in line."""
        for queued in [self._queues.leave_line(request_id) for request_id in list(run.in_line)]:
            self._place_new(queued, now)

    def _admit_waiting(self, now: float) -> None:
        """Let programs in, in turn, until one does not fit: nobody is overtaken by smaller ones."""
        self.may_admit = False
        while len(self._queues.line):
            first = self._queues.line.next(now, self._turn).queued
            run = self._programs[first.program_id]
            if not self._try(first, run, now):
                break
            self._queues.leave_line(first.request_id)
            self._let_in(run, now)

    def _try(self, queued: Queued, run: ProgramRun, now: float) -> bool:
        """Bind or defer a request; say no if no worker may take it."""
        match = self._match(queued)
        allowed = self._allowed(queued, run, match, self._workers)
        if not allowed:
            return False
        decision = self._choose(queued, run, match, allowed, now)
        worker = next(worker for worker in allowed if worker.worker_id == decision.worker_id)
        if self._mechanisms.late_binding and not self._starts_soon(queued, worker, match):
            self._defer(queued, run, worker, match, decision)
        else:
            self._bind(queued, worker, match, decision, now)
        return True

    def _starts_soon(self, queued: Queued, worker: Worker, match: Match) -> bool:
        """Whether a new request may be bound at once: nothing waits before it, and there is room."""
        return not worker.backlog_s and _has_room(worker) and not self._stalls(worker, queued, match, 1)

    def _stalls(self, worker: Worker, queued: Queued, match: Match, num_waiting: int) -> bool:
        """Whether the requests that decode should end before they stand still for the prefill of a prompt.

        They lose its prefill each; the `num_waiting` requests lose the time that the decodes need to end. If
        that is longer than the prefill, the batch will be as large by then, and nothing is gained by waiting.
        """
        if not (self._mechanisms.decode_gaps and worker.num_decode):
            return False
        prefill_s = _prefill_s(worker, queued, match)
        drain_s = worker.expected_output_len * worker.profile.step_s(worker.num_decode)
        return prefill_s > drain_s and worker.num_decode * prefill_s > num_waiting * drain_s

    def _allowed(
        self, queued: Queued, run: ProgramRun, match: Match, workers: Sequence[Worker]
    ) -> Sequence[Worker]:
        if self._admission.is_open_to_all:
            return workers
        if run.planned_tokens is None:
            return self._admission.allowed(run, _added_len(queued, match, workers[0]), {}, workers)
        return self._admission.allowed(run, run.usual_len(queued), match.lens, workers)

    def _defer(
        self, queued: Queued, run: ProgramRun, worker: Worker, match: Match, decision: Decision
    ) -> None:
        """Let a request wait in a worker's backlog; its program opens there all the same."""
        opens = worker.worker_id not in run.promised
        work_s = _work_s(worker, queued, match)
        missed_len = len(queued.request.prompt) - match.len_on(worker.worker_id)
        self._queues.defer(Waiting(queued, rank(queued, run), decision, work_s, missed_len, opens), worker)
        self._open(run, queued, worker, match, 0)

    def pause(self, run: ProgramRun, expected_s: float) -> None:
        """Close a program that waits where that is not worth its room."""
        workers = {worker.worker_id: worker for worker in self._workers}
        for worker_id in list(run.promised):
            worker = workers.get(worker_id)
            again_s = worker.profile.prefill_s(run.promised[worker_id]) if worker else 0.0
            is_worth_it = self._mechanisms.hold_pauses and expected_s <= PAUSE_WORTH * again_s
            if run.num_unfinished == 0 and not is_worth_it:
                self._programs.close(run, worker_id)
                self.may_admit = True

    def _match(self, queued: Queued) -> Match:
        """Return what each worker will have of a prompt once it has done what waits for it."""
        match = self._bindings.match(queued)
        if not self._queues.num_backlogged:
            return match
        lens = dict(match.lens)
        usable = queued.packed[: reusable_len(queued.request) * TOKEN_BYTES]
        for worker in self._workers:
            if worker.backlog_s:
                shared_len = self._queues.backlog(worker.worker_id).shared_len(
                    queued.request.namespace, usable
                )
                lens[worker.worker_id] = max(lens.get(worker.worker_id, 0), shared_len)
        return replace(match, lens=lens)

    def _choose(
        self, queued: Queued, run: ProgramRun, match: Match, allowed: Sequence[Worker], now: float
    ) -> Decision:
        if len(allowed) == 1:
            return Decision(allowed[0].worker_id, "only_worker")
        future = self._future(queued.request.namespace, run) if run.plan and not run.is_open else {}
        fleet = FleetView(allowed, self._tree, now, self._rng, future)
        return self._policy.choose(queued.request, match, fleet)

    def _future(self, namespace: str, run: ProgramRun) -> dict[WorkerId, int]:
        """Return how many tokens each worker has of the prefixes that a program will use. O(prefixes)."""
        future: dict[WorkerId, int] = {}
        for prefix in run.plan.prefixes if run.plan else ():
            for worker_id, matched_len in self._tree.match(namespace, prefix.tobytes()).lens.items():
                future[worker_id] = future.get(worker_id, 0) + matched_len
        return future

    def _bind(self, queued: Queued, worker: Worker, match: Match, decision: Decision, now: float) -> None:
        bound = self._bindings.bind(queued, worker, match, decision, now)
        output_len = _output_len(worker, queued)
        bound.charged_s = bound.visit.prefill_s + worker.profile.decode_s(output_len)
        self._fair.charge(queued.request.tenant, bound.charged_s)
        run = self._programs[queued.program_id]
        if run.planned_tokens is None:
            bound.promised_len = bound.visit.missed_len + round(output_len)
        self._open(run, queued, worker, match, bound.promised_len)
        if run.plan is not None and run.plan.prefixes:
            self._expect(run, bound)
        if self._mechanisms.late_binding:
            self._queues.backlog(worker.worker_id).placed(queued, worker.worker_id)
        self._queues.line.placed(queued, worker.worker_id)

    def _expect(self, run: ProgramRun, bound: Bound) -> None:
        """Mark what of a bound prompt the program's calls to come will use, if it is more than before."""
        assert run.plan is not None
        packed = bound.queued.packed
        shared_len = max(common_prefix_len(packed, prefix.tobytes()) for prefix in run.plan.prefixes)
        end = next((n for n in ancestors(bound.visit.tail) if n.start_len < shared_len), None)
        if end is not None and (run.expected is None or end.end_len > run.expected.end_len):
            self._programs.expect(run, end)

    def _open(self, run: ProgramRun, queued: Queued, worker: Worker, match: Match, num_tokens: int) -> None:
        """Open a program on a worker, with what its plan needs beyond what is there, or promise it more."""
        if run.planned_tokens is not None and worker.worker_id not in run.promised:
            num_tokens = max(0, run.usual_len(queued) - match.len_on(worker.worker_id))
        self._programs.promise(run, worker.worker_id, num_tokens)

    def _draw_backlogs(self, now: float) -> None:
        """Fill the workers that have room, from their own backlogs first."""
        for worker in self._workers:
            backlog = self._queues.backlog(worker.worker_id)
            while len(backlog) and _has_room(worker):
                waiting = backlog.next(now, self._turn)
                queued, decision = waiting.queued, waiting.decision
                assert decision is not None, "a backlog holds decided requests"
                match = self._bindings.match(queued)
                if self._stalls(worker, queued, match, len(backlog)):
                    break
                self._queues.draw(queued.request_id, worker)
                self._bind(queued, worker, match, decision, now)

    def _steal(self, now: float) -> bool:
        """Let a worker with room take the last of the longest backlog, if it starts so much sooner there.

        Say whether there was something to steal. O(workers).
        """
        owner = max(self._workers, key=attrgetter("backlog_s"))
        thieves = [worker for worker in self._workers if not worker.backlog_s and _has_room(worker)]
        if not thieves or not owner.backlog_s:
            return False
        waiting = self._queues.backlog(owner.worker_id).last()
        queued = waiting.queued
        run = self._programs[queued.program_id]
        match = self._bindings.match(queued)
        start_s = {
            worker.worker_id: worker.prefill_wait_s + _prefill_s(worker, queued, match)
            for worker in self._allowed(queued, run, match, thieves)
        }
        there_s = owner.prefill_wait_s + owner.backlog_s
        thief = min(thieves, key=lambda worker: start_s.get(worker.worker_id, inf))
        repeated_s = _prefill_s(thief, queued, match) - _prefill_s(owner, queued, match)
        too_late = start_s.get(thief.worker_id, inf) + STEAL_MARGIN * max(0.0, repeated_s) >= there_s
        if too_late or self._stalls(thief, queued, match, 1):
            return False
        self._queues.draw(queued.request_id, owner)
        if waiting.opens and run.planned_tokens is not None:
            self._programs.close(run, owner.worker_id)
        costs = start_s | {owner.worker_id: there_s}
        self._bind(queued, thief, match, Decision(thief.worker_id, "steal", costs), now)
        return True


def _has_room(worker: Worker) -> bool:
    return not (worker.num_held or worker.num_prefill) or worker.pending_prefill_tokens < BIND_AHEAD_LEN


def _output_len(worker: Worker, queued: Queued) -> float:
    expected = queued.request.expected_output_len
    return min(
        queued.request.sampling.max_new_tokens, worker.expected_output_len if expected is None else expected
    )


def _prefill_s(worker: Worker, queued: Queued, match: Match) -> float:
    matched_len = match.len_on(worker.worker_id)
    return worker.profile.prefill_s(len(queued.request.prompt) - matched_len, matched_len)


def _work_s(worker: Worker, queued: Queued, match: Match) -> float:
    return _prefill_s(worker, queued, match) + worker.profile.decode_s(_output_len(worker, queued))


def _added_len(queued: Queued, match: Match, worker: Worker) -> int:
    """Return the KV tokens that a request without a plan adds where most of it is cached."""
    matched_len = max(match.lens.values(), default=0)
    return len(queued.request.prompt) - matched_len + round(_output_len(worker, queued))
