"""preble_plan: one cost in seconds per worker, which looks forward where E2 looks back.

    cost_i = wait_i + prefill_i · (1 + batch_i) + repeat_i + evict_i - future_i + decode_i

- wait_i: prefill that was sent to i or waits for it, and comes before the request;
- prefill_i: what the request's own prefill adds to that. Prompts are prefilled in batches, so a short one
  behind others costs its tokens and no iteration of its own. Runtimes prefill first, so everything in i's
  batch stands still for as long: it is paid once for the request and once for each of those. (LMetric, OSDI
  2026, has the same product; without it, a prefix is computed again far too readily.)
- repeat_i: PT of the tokens that another worker would not have to compute. It is work that adds nothing, and
  sooner or later somebody waits for it; a burst on an idle fleet would otherwise copy its prefix everywhere;
- evict_i: what making room would cost others, PT of each victim times how likely it is used again: certain if
  the plan of an open program says so, else the share of i's recent requests that used it;
- future_i: the prefill that i would save the program's calls to come, PT of what i has of each planned
  prefix; counted until the program is open somewhere, because afterwards its calls follow its cache;
- decode_i: by how much the others in i's batch slow the request's decoding.

The least cost wins; ties go to the fewest unfinished requests, then to the first id. It says `exploit` when
the winner has most of the prompt, `explore` otherwise. Most of the gain of planning is not in this cost but
in the mechanisms that the scheduler runs with it (`admission.Mechanisms`): without a backlog and without
pressure on the KV cache this is close to E2 with live queues in place of its window.
"""

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match, Node
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, TreeView, WorkerView


class PreblePlan:
    """One cost in seconds, with the calls to come in it."""

    name = "preble_plan"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Return the worker with the least cost. O(workers + evicted nodes)."""
        costs = _costs_s(request, match, fleet)
        least = min(costs.values())
        cheapest = [worker for worker in fleet.workers if costs[worker.worker_id] == least]
        chosen = min(cheapest, key=lambda worker: worker.num_bound + worker.num_foreign)
        exploits = 2 * match.len_on(chosen.worker_id) > len(request.prompt)
        return Decision(chosen.worker_id, "exploit" if exploits else "explore", costs)


def _costs_s(request: Request, match: Match, fleet: FleetView) -> dict[WorkerId, float]:
    """Return the cost of every worker. Written out in one loop: it is what a decision spends its time on."""
    prompt_len, limit, lens = len(request.prompt), request.sampling.max_new_tokens, match.lens
    most_len = max(lens.values(), default=0)
    costs: dict[WorkerId, float] = {}
    profile = None
    for worker in fleet.workers:
        if worker.profile is not profile:  # often the same for all
            profile = worker.profile
            floor_s, base_s, token_s = profile.floor_s, profile.base_s, profile.token_s
            best_s = profile.prefill_s(prompt_len - most_len, most_len)
        worker_id, wait_s = worker.worker_id, worker.prefill_wait_s
        num_bound = worker.num_bound + worker.num_foreign
        matched_len = lens.get(worker_id, 0)
        missed_len = prompt_len - matched_len
        attention_s = profile.attention_s(missed_len, matched_len)
        alone_s = base_s + token_s * missed_len
        joined_s = alone_s + token_s * worker.pending_prefill_tokens
        prefill_s = (joined_s if joined_s > floor_s else floor_s) - wait_s + attention_s
        repeat_s = (alone_s if alone_s > floor_s else floor_s) + attention_s - best_s
        expected_len = worker.expected_output_len
        output_len = limit if limit < expected_len else expected_len
        cost = wait_s + worker.backlog_s + prefill_s * (1 + num_bound) + repeat_s
        cost += profile.step_request_s * output_len * num_bound
        if num_bound and profile.shared_prefix:
            cost -= profile.shared_s(matched_len, output_len)
        cache = worker.cache
        if cache.used + missed_len + output_len > cache.capacity:
            cost += _evict_s(worker, missed_len + round(output_len), match, fleet.tree)
        if fleet.future:
            cost -= profile.prefill_s(fleet.future.get(worker_id, 0))
        costs[worker_id] = cost
    return costs


def _evict_s(worker: WorkerView, need_len: int, match: Match, tree: TreeView) -> float:
    """Return the prefill that others lose to the evictions which make room for `need_len` tokens."""
    worker_id = worker.worker_id
    excess_len = need_len - tree.free_tokens(worker_id)
    return sum(
        _reuse(node, worker) * worker.profile.prefill_s(node.num_tokens, node.start_len)
        for node in tree.eviction_candidates(worker_id, excess_len)
        if node not in match.path
    )


def _reuse(node: Node, worker: WorkerView) -> float:
    if node.expected:
        return 1.0
    return node.recent.get(worker.worker_id, 0) / worker.num_recent if worker.num_recent else 0.0
