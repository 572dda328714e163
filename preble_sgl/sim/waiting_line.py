"""The requests that wait in an engine, put into the order of its wait queue as SGLang does."""

from collections.abc import Iterator

from preble_sgl.core import Request, Usage
from preble_sgl.sim.jobs import Job
from preble_sgl.sim.kv_cache import KvCache
from preble_sgl.sim.wait_queue import MAX_MATCHED, STOCK_ORDERS, Served, WaitOrder, ordered


class WaitingLine:
    """What waits, in line."""

    def __init__(self, order: WaitOrder, cache: KvCache) -> None:
        self._order = order
        self._cache = cache
        self._jobs: list[Job] = []
        self._served = Served()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def join(self, job: Job) -> None:
        """Let a request wait at the end."""
        self._jobs.append(job)

    def leave(self, job: Job) -> None:
        """Take a request out that is given up. Raises ValueError if it does not wait."""
        self._jobs.remove(job)

    def let_in(self, num: int) -> None:
        """Take the first out."""
        del self._jobs[:num]

    def sort(self, prefilled_tokens: int) -> None:
        """Put all into order. `prefilled_tokens`: what the engine has computed so far."""
        if self._order == "fcfs" or (self._order == "lpm" and len(self._jobs) > MAX_MATCHED):
            return
        for job in self._jobs:
            self.match(job)
            if self._order not in STOCK_ORDERS:
                job.served_len = self._served[job.request.program_id]
                job.waited_len = prefilled_tokens - job.arrived_at_len
        self._jobs = ordered(self._order, self._jobs)

    def match(self, job: Job) -> None:
        """Find what is cached of a request by now."""
        usable_len = (job.request.score_from or job.total_len) - 1
        job.node = self._cache.match(job.node, job.packed, usable_len)

    def count_service(self, request: Request, usage: Usage) -> None:
        """Note what a request has cost when it ends."""
        self._served.add(request.program_id, usage.computed_tokens + usage.output_tokens)
