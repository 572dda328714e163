"""preble_plan: one cost in seconds per worker, which looks forward where E2 looks back.

    cost_i = wait_i + prefill_i + evict_i - future_i + decode_i            (design of this project)

- wait_i: prefill that was sent to i or waits for it, and comes before the request;
- prefill_i: the request's own prefill on i, PT(missed_i);
- evict_i: what making room would cost others, PT of each victim times how likely it is used again: certain if
  a planned program that is open still needs it, else the share of i's recent requests that used it;
- future_i: the prefill that i would save the program's calls to come, PT of what i has of each planned
  prefix; counted until the program is open somewhere, because afterwards its calls follow its cache;
- decode_i: the request's expected output, at the pace of i's running batch.

The least cost wins; ties go to the fewest unfinished requests, then to the first id. It says `exploit` when
the winner has most of the prompt, `explore` otherwise. Most of the gain of planning is not in this cost but
in the mechanisms that the scheduler runs with it (`admission.Mechanisms`): without a backlog and without
pressure on the KV cache this is close to E2 with live queues in place of its window.
"""

from operator import attrgetter

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.preble_e2 import eviction_s
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class PreblePlan:
    """One cost in seconds, with the calls to come in it."""

    name = "preble_plan"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Return the worker with the least cost. O(workers + evicted nodes)."""
        costs = _costs_s(request, match, fleet)
        least = min(costs.values())
        cheapest = [worker for worker in fleet.workers if costs[worker.worker_id] == least]
        chosen = min(cheapest, key=attrgetter("num_bound"))
        exploits = 2 * match.len_on(chosen.worker_id) > len(request.prompt)
        return Decision(chosen.worker_id, "exploit" if exploits else "explore", costs)


def _costs_s(request: Request, match: Match, fleet: FleetView) -> dict[WorkerId, float]:
    """Return the cost of every worker. Written out in one loop: it is what a decision spends its time on."""
    prompt_len, limit, lens = len(request.prompt), request.sampling.max_new_tokens, match.lens
    costs: dict[WorkerId, float] = {}
    profile, prefilled_len, prefill_s = None, -1, 0.0
    for worker in fleet.workers:
        worker_id = worker.worker_id
        matched_len = lens.get(worker_id, 0)
        if matched_len != prefilled_len or worker.profile is not profile:  # often as on the one before
            profile, prefilled_len = worker.profile, matched_len
            prefill_s = profile.prefill_s(prompt_len - matched_len, matched_len)
        output_len = min(limit, worker.expected_output_len)
        cost = worker.prefill_wait_s + worker.backlog_s + prefill_s
        # A step serves the whole batch: each request pays for all that decode beside it.
        cost += profile.decode_token_s * output_len * (worker.num_bound + 1)
        if fleet.tree.free_tokens(worker_id) < prompt_len - matched_len + output_len:
            cost += eviction_s(worker, request, match, fleet.tree)
        if fleet.future:
            cost -= profile.prefill_s(fleet.future.get(worker_id, 0))
        costs[worker_id] = cost
    return costs
