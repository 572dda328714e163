"""Fleets as a policy sees them: workers with given loads and caches, and no scheduler around them."""

import random
from collections.abc import Sequence

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies import Decision, FleetView, Policy
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.worker import OutputLengths, Worker
from tests.global_sched.stories import FREE_DECODE, prompt, request


class Fleet:
    """Workers w0, w1, … with `bound[i]` unfinished requests each. `open_ids` leaves out those that drain."""

    def __init__(self, bound: Sequence[int], *, seed: int = 0, page_size: int = 1) -> None:
        self.tree = RadixTree(window_s=180.0)
        self.workers = {}
        for i, num_bound in enumerate(bound):
            self.tree.add_worker(WorkerId(f"w{i}"), capacity=1_000_000, page_size=page_size)
            self.workers[f"w{i}"] = _worker(f"w{i}", num_bound, self.tree)
        self.open_ids = list(self.workers)
        self.rng = random.Random(seed)
        self.now = 0.0

    def cache(self, worker: str, text: str, *, namespace: str = "") -> None:
        """Let a worker have a prefix."""
        self.tree.insert(namespace, prompt(text).tobytes(), WorkerId(worker))

    def choose(self, policy: Policy, asked: Request | str) -> Decision:
        """Ask a policy about a request, or about a prompt in a session of its own. Changes no load."""
        if isinstance(asked, str):
            asked = request(f"r{self.rng.random()}", asked)
        return policy.choose(asked, self.match(asked), self.view())

    def place(self, policy: Policy, asked: Request | str) -> str:
        """Ask a policy and let its worker have one request more."""
        worker_id = self.choose(policy, asked).worker_id
        self.workers[worker_id].num_bound += 1
        return worker_id

    def match(self, asked: Request) -> Match:
        return self.tree.match(asked.namespace, asked.prompt.tobytes())

    def view(self) -> FleetView:
        return FleetView([self.workers[name] for name in self.open_ids], self.tree, self.now, self.rng)


def _worker(name: str, num_bound: int, tree: RadixTree) -> Worker:
    cache = tree.cache(WorkerId(name))
    worker = Worker(WorkerId(name), 1_000_000, 1, FREE_DECODE, OutputLengths(), cache)
    worker.num_bound = num_bound
    return worker
