"""preble_e2: "exploitation + exploration" of Preble (ICLR 2025, arXiv 2407.00023, section 3), repaired.

For a request R of which the fleet has at most `cached` tokens on one worker, and `missed` is the rest:

- **exploit** if missed < cached: of the workers that have the longest match, the one with the least LoadCost;
- **explore** otherwise: a worker that decodes much and prefills little, if there is one (prefill/decode
  balancing), else the worker with the least LoadCost of all.

LoadCost(i, R) = L_i + M_i + P_i, in worker seconds (Preble, algorithm 2):

- L_i: what the requests bound to i within H cost it, sum of PT(missed) + DT(average output on i), and what
  waits for it, where requests are bound late;
- M_i: what evicting for R's prompt and output would cost others, sum over the victims j of PT(len_j) times
  the share of i's requests in H that used j;
- P_i: R's own prefill on i, PT(missed_i).

After that choice, an exploiting request may still be moved:

- **rebalance**: if i's load L_i is above Th_bal times that of the lightest worker, to that worker;
- **replicate**: if the queueing time of R's key prefix doubled over H on every worker that has it, to the
  cheapest worker that does not.

Repairs. Against Preble's code: P_i is counted; workers are compared by id; a full hit is exploited; PT is
clamped; output lengths are estimated, not read off the answer; missed tokens are per request and worker; the
cost of a decision does not grow with the tree. Against the paper's text, which leaves room:

- DecodeRatio(i) is the window's decode seconds over its prefill seconds on i, and it is imbalanced when it
  exceeds IMBALANCE times the *fleet's* ratio: where all workers decode much, nothing is out of balance. The
  paper lets this precede any look at load; here it may not pick a worker already too heavy by Th_bal.
- Both moves recompute a prefix that exists, so both must pay: the request must reach its first token much
  sooner there (rebalance: by Th_bal), the recomputed prefix included. What waits is prefill, because runtimes
  prefill before they decode. So a burst of short questions to one document stays with the document, while a
  long shared header in front of long questions spreads.
- A victim that is R's own prefix does not count: R would lock it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from preble_sgl.core import PlacementReason, Request, WorkerId
from preble_sgl.global_sched.node import Match, Node
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, TreeView, WorkerView

TH_BAL = 1.5
"""Preble's HIGH_LOAD_THRESHOLD: how much heavier than the lightest worker one may be."""

IMBALANCE = 2.0
"""How much more decode per prefill than the fleet makes a worker the place for a prefill."""

MIN_QUEUEING_SAMPLES = 4
"""Queueing times needed in each half of the window before their averages are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrebleE2:
    """The paper's E2, repaired. Ties go to the fewest unfinished requests, then to the first id.

    `rebalance`, `replicate`, `balance`: whether it moves requests so, and weighs prefill against decode. All
    belong to E2; an ablation leaves some out.
    """

    name = "preble_e2"

    rebalance: bool = True
    replicate: bool = True
    balance: bool = True

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Exploit or explore. O(workers + evicted nodes)."""
        lens = match.lens
        cached_len = max(lens.get(worker.worker_id, 0) for worker in fleet.workers)
        if len(request.prompt) - cached_len < cached_len:
            return self._exploit(request, match, fleet, cached_len)
        return self._explore(request, match, fleet)

    def _exploit(self, request: Request, match: Match, fleet: FleetView, cached_len: int) -> Decision:
        lens = match.lens
        holders = [worker for worker in fleet.workers if lens.get(worker.worker_id) == cached_len]
        costs = _load_costs(holders, request, match, fleet.tree)
        chosen = _cheapest(holders, costs)
        others = [worker for worker in fleet.workers if worker not in holders]
        reason: PlacementReason = "rebalance"
        target = _rebalance(chosen, others, request, match) if self.rebalance else None
        if target is None and self.replicate:
            reason = "replicate"
            target = _replicate(chosen, request, match, fleet)
        if target is None:
            return Decision(chosen.worker_id, "exploit", costs)
        return Decision(target.worker_id, reason, costs | _load_costs([target], request, match, fleet.tree))

    def _explore(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        costs = _load_costs(fleet.workers, request, match, fleet.tree)
        decoder = _decode_heavy(fleet.workers) if self.balance else None
        if decoder is not None:
            return Decision(decoder.worker_id, "balance", costs)
        return Decision(_cheapest(fleet.workers, costs).worker_id, "explore", costs)


def _cheapest(workers: Sequence[WorkerView], costs: Mapping[WorkerId, float]) -> WorkerView:
    return min(workers, key=lambda worker: (costs[worker.worker_id], worker.num_bound))


def _lightest(workers: Sequence[WorkerView]) -> WorkerView:
    return min(workers, key=attrgetter("recent_s"))


# LoadCost


def _load_costs(
    workers: Iterable[WorkerView], request: Request, match: Match, tree: TreeView
) -> dict[WorkerId, float]:
    return {
        worker.worker_id: worker.recent_s
        + worker.backlog_s
        + eviction_s(worker, request, match, tree)
        + prefill_s(worker, request, match)
        for worker in workers
    }


def prefill_s(worker: WorkerView, request: Request, match: Match) -> float:
    """P_i: the request's own prefill."""
    matched_len = match.len_on(worker.worker_id)
    return worker.profile.prefill_s(len(request.prompt) - matched_len, matched_len)


def eviction_s(worker: WorkerView, request: Request, match: Match, tree: TreeView) -> float:
    """M_i: the prefill that others lose to the evictions which make room for the request."""
    worker_id = worker.worker_id
    output_len = min(request.sampling.max_new_tokens, round(worker.expected_output_len))
    need_len = len(request.prompt) - match.len_on(worker_id) + output_len - tree.free_tokens(worker_id)
    if need_len <= 0 or not worker.num_recent:
        return 0.0
    lost_s = sum(
        node.recent.get(worker_id, 0) * worker.profile.prefill_s(node.num_tokens, node.start_len)
        for node in tree.eviction_candidates(worker_id, need_len)
        if node not in match.path
    )
    return lost_s / worker.num_recent


# Prefill/decode balancing


def _decode_heavy(workers: Sequence[WorkerView]) -> WorkerView | None:
    """Return the worker with by far the most decoding per prefill, unless it is too heavy."""
    fleet_prefill_s = sum(worker.recent_prefill_s for worker in workers)
    busy = [worker for worker in workers if worker.recent_prefill_s > 0]
    if not busy:
        return None
    fleet_ratio = sum(worker.recent_decode_s for worker in busy) / fleet_prefill_s
    top = max(busy, key=_decode_ratio)
    too_heavy = top.recent_s > TH_BAL * _lightest(workers).recent_s
    return top if _decode_ratio(top) > IMBALANCE * fleet_ratio and not too_heavy else None


def _decode_ratio(worker: WorkerView) -> float:
    return worker.recent_decode_s / worker.recent_prefill_s


# After the choice


def _rebalance(
    chosen: WorkerView, others: Sequence[WorkerView], request: Request, match: Match
) -> WorkerView | None:
    """Return the lightest of the others if `chosen` is too heavy and R would start much sooner there."""
    if not others:
        return None
    target = _lightest(others)
    heavy = chosen.recent_s > TH_BAL * target.recent_s
    sooner = _start_s(chosen, request, match) > TH_BAL * _start_s(target, request, match)
    return target if heavy and sooner else None


def _replicate(chosen: WorkerView, request: Request, match: Match, fleet: FleetView) -> WorkerView | None:
    """Return the cheapest worker without R's key prefix if all that have it queue twice as long as before."""
    key = match.key_node(chosen.worker_id)
    if key is None:
        return None
    with_key = [worker for worker in fleet.workers if worker.worker_id in key.shares]
    without = [worker for worker in fleet.workers if worker.worker_id not in key.shares]
    doubled_s = [_doubled_queueing_s(key, worker, fleet.now) for worker in with_key]
    queueing_s = [seconds for seconds in doubled_s if seconds is not None]
    if not without or len(queueing_s) < len(with_key):
        return None
    target = _cheapest(without, _load_costs(without, request, match, fleet.tree))
    return target if min(queueing_s) > _start_s(target, request, match) else None


def _doubled_queueing_s(key: Node, worker: WorkerView, now: float) -> float | None:
    trend = key.trends.get(worker.worker_id)
    return trend.doubled_to(now, MIN_QUEUEING_SAMPLES) if trend is not None else None


def _start_s(worker: WorkerView, request: Request, match: Match) -> float:
    """Seconds to R's first token: the prefill in front of it and its own."""
    return worker.prefill_wait_s + prefill_s(worker, request, match)
