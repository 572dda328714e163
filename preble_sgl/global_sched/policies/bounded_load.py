"""How many unfinished requests one worker may have, as a multiple of the fleet's average.

The rule of "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam, SODA 2018,
arXiv 1608.01350): of m requests, the new one included, no worker of n gets more than ceil(c · m / n). For
c >= 1 some worker always has room.
"""

from collections.abc import Sequence
from math import ceil

from preble_sgl.global_sched.policies.protocol import WorkerView


def max_requests(workers: Sequence[WorkerView], factor: float) -> int:
    """Return how many requests a worker may have once one more is placed. O(workers)."""
    num_requests = sum(worker.num_bound for worker in workers) + 1
    return ceil(factor * num_requests / len(workers))
