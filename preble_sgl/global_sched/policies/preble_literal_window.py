"""What `preble_literal` remembers of the last three minutes, and how it prices prefill; both as in Preble.

Statistics are kept per key portion and for all workers together (`SlidingWindowHistogram` in Preble's
`global_scheduler_with_time.py`), first-token times per key portion and worker (`ttft_overload_detector.py`).

Kept as they are there: a miss rate that is one for the whole cluster, is refreshed only by the next request
and takes every token of a full hit for missed; an output length that is the last request's `max_new_tokens`;
tokens that leave the window in another number than they entered it, if their node was split meanwhile; and a
prefill time that is negative from 361 to 383 new tokens.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.policies.preble_literal_tree import HistoryNode

WINDOW_S = 180.0
"""Preble's window, whatever the scheduler's is."""


def prefill_s(new_len: int, context_len: int) -> float:
    """Return Preble's PT: seconds to prefill `new_len` tokens of a sequence of `context_len`.

    `LP_mistral_7b_A6000_sglang_extend_flashinfer` of its `model_equations.py`, on any worker.
    """
    if new_len >= 384:
        linear_ms = 0.10842571 * new_len + 4.209777054806409
    elif new_len >= 192:
        linear_ms = -118 + 1.25 * new_len - 2.56e-3 * new_len**2
    else:
        linear_ms = 22.0
    return (linear_ms + _attention_ms(new_len, context_len)) / 1e3 / 0.9


def _attention_ms(new_len: int, context_len: int) -> float:
    linear_ms = 0.32
    if context_len > 1024:
        linear_ms = 1.86e-4 * context_len + 0.159
        if new_len <= 1024:
            linear_ms /= 2
    if new_len * context_len <= 1024 * 1024:
        return linear_ms
    return linear_ms + 1.13e-3 * new_len + 1.75e-3 * context_len + 2.19e-6 * new_len * context_len


@dataclass(slots=True)
class PortionStats:
    """The requests of one key portion within the window. `miss_rate`: as of the last one that came."""

    num_requests: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    miss_rate: float = 1.0
    output_len: int = 0


@dataclass(slots=True)
class Arrival:
    """One request in the window: when it came, its key portion and its leaf."""

    at: float
    portion: HistoryNode
    leaf: HistoryNode


class HistoryWindow:
    """Statistics of the key portions seen in the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._arrivals: deque[Arrival] = deque()
        self.portions: dict[HistoryNode, PortionStats] = {}

    def add(self, arrival: Arrival, output_len: int) -> None:
        """Count a request; drop what is too old. Amortised O(1)."""
        self._arrivals.append(arrival)
        stats = self.portions.setdefault(arrival.portion, PortionStats())
        stats.num_requests += 1
        stats.hit_tokens += arrival.leaf.start_len
        stats.prompt_tokens += arrival.leaf.end_len
        stats.miss_rate = 1 - stats.hit_tokens / stats.prompt_tokens
        stats.output_len = output_len
        while self._arrivals[0].at < arrival.at - WINDOW_S:
            self._drop(self._arrivals.popleft())

    def rename(self, old: HistoryNode, new: HistoryNode) -> None:
        """Move the statistics of a portion to the node split off above it. O(window)."""
        if old not in self.portions:
            return
        self.portions[new] = self.portions.pop(old)
        for arrival in self._arrivals:
            if arrival.portion is old:
                arrival.portion = new

    def _drop(self, arrival: Arrival) -> None:
        """Take a request out; a portion without requests loses its workers."""
        stats = self.portions[arrival.portion]
        stats.num_requests -= 1
        stats.hit_tokens -= arrival.leaf.start_len
        stats.prompt_tokens -= arrival.leaf.end_len
        if not stats.num_requests:
            del self.portions[arrival.portion]
            arrival.portion.allocation.clear()


class OverloadDetector:
    """First-token times of each key portion on each worker: have they doubled within the window?"""

    def __init__(self) -> None:
        self._samples: dict[tuple[HistoryNode, WorkerId], deque[tuple[float, float]]] = {}

    def add(self, portion: HistoryNode, worker_id: WorkerId, ttft_s: float, now: float) -> None:
        """Count one time and drop those too old. Amortised O(1)."""
        samples = self._samples.setdefault((portion, worker_id), deque())
        samples.append((now, ttft_s))
        while samples[0][0] < now - WINDOW_S:
            samples.popleft()

    def is_overloaded(self, portion: HistoryNode, worker_id: WorkerId, now: float) -> bool:
        """Say whether the mean of the last half window is twice that of all before it. O(samples)."""
        samples = self._samples.get((portion, worker_id), ())
        older = [ttft_s for at, ttft_s in samples if at < now - WINDOW_S / 2]
        newer = [ttft_s for at, ttft_s in samples if at >= now - WINDOW_S / 2]
        return bool(older and newer) and sum(newer) / len(newer) >= 2 * sum(older) / len(older)

    def rename(self, old: HistoryNode, new: HistoryNode, worker_ids: Iterable[WorkerId]) -> None:
        """Move the samples of a portion to the node split off above it."""
        for worker_id in worker_ids:
            if (old, worker_id) in self._samples:
                self._samples[new, worker_id] = self._samples.pop((old, worker_id))

    def forget(self, portion: HistoryNode, worker_id: WorkerId) -> None:
        """Start anew for a portion on a worker."""
        self._samples.pop((portion, worker_id), None)

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Forget a worker that is gone. O(samples)."""
        self._samples = {key: samples for key, samples in self._samples.items() if key[1] != worker_id}
