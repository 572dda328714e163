"""Which waiting prompts fit into the next prefill batch, as SGLang's `PrefillAdder` decides.

A prompt is added if its new tokens and the output it may produce fit into the pool beside what is reserved
for running requests, and while the budget of new tokens lasts. The one that exceeds `chunk_tokens` is cut.
"""

from typing import Literal

from preble_sgl.sim.decode_batch import remaining_limit
from preble_sgl.sim.jobs import Job, paged
from preble_sgl.sim.kv_cache import KvCache

Verdict = Literal["whole", "chunked", "no room", "no budget"]


class PrefillBatch:
    """A batch being put together; memory and locks are taken at once. `prefills`: jobs, their new tokens."""

    def __init__(
        self,
        cache: KvCache,
        *,
        chunk_tokens: int | None,
        max_prefill_tokens: int,
        num_decodes: int,
        reserved_len: float,
    ) -> None:
        self.prefills: list[tuple[Job, int]] = []
        self._cache = cache
        self._chunk_left = (
            max(chunk_tokens or max_prefill_tokens, cache.page_size + num_decodes) - num_decodes
        )
        self._may_chunk = chunk_tokens is not None
        self._input_left = max_prefill_tokens
        self._reserved_len = reserved_len

    def next_chunk(self, job: Job) -> int:
        """Return how many tokens of a prompt under way come next: one page at least."""
        return self._cut(job.total_len - job.kv_len)

    def go_on(self, job: Job, new_len: int) -> None:
        """Add the next chunk of a prompt that is under way, for which memory was allocated."""
        if job.kv_len + new_len == job.total_len:
            self._reserved_len += remaining_limit(job)
        self._take(job, new_len)

    def add(self, job: Job) -> Verdict:
        """Add a waiting prompt, or say why not; then nothing is changed."""
        missing_len = job.missing_len
        need_len = missing_len + remaining_limit(job)
        if need_len >= self._room():
            return "no room"
        if missing_len >= self._input_left and self.prefills:
            return "no budget"
        self._cache.lock(job.node)
        new_len = self._cut(missing_len)
        fits = need_len < self._room() and new_len > 0
        if not fits or not self._cache.allocate(paged(new_len, self._cache.page_size)):
            verdict: Verdict = "no budget" if need_len < self._room() and new_len <= 0 else "no room"
            self._cache.unlock(job.node)
            return verdict
        job.kv_len = job.node.end_len
        self._reserved_len += need_len - new_len
        self._take(job, new_len)
        return "whole" if new_len == missing_len else "chunked"

    def _room(self) -> float:
        return self._cache.num_available - self._reserved_len

    def _cut(self, missing_len: int) -> int:
        if not self._may_chunk or missing_len <= self._chunk_left:
            return missing_len
        return max(0, self._chunk_left - self._chunk_left % self._cache.page_size)

    def _take(self, job: Job, new_len: int) -> None:
        self.prefills.append((job, new_len))
        self._chunk_left -= new_len
        self._input_left -= new_len
