"""The requests that decode together, advanced many steps at a time.

Nothing is counted per request and step. A request knows the step at which it ends; how much it has generated
follows from the number of steps that the batch has made, and the sums over the batch are kept as it changes.
"""

import heapq
from collections.abc import Iterator

from preble_sgl.sim.jobs import Job, paged

CLIP_LEN = 4096
"""SGLang reckons with at most so many output tokens to come of one request."""

EXPECTED_SHARE = 0.7
LEAST_SHARE = 0.098
DECAY_STEPS = 600
"""Share of their limits that running requests are expected to generate: at first, at least, steps between."""

RETRACT_STEPS = 20
"""Decode steps to come that the share is reckoned with after a retraction."""


class DecodeBatch:
    """The running requests. `context`: tokens of KV that they have together. `step`: decode steps made."""

    def __init__(self, page_size: int) -> None:
        self.step = 0
        self.context = 0
        self._page_size = page_size
        self._jobs: dict[int, Job] = {}
        self._ends: list[tuple[int, int, Job]] = []
        self._limits = 0
        self._long: dict[int, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, job: Job) -> bool:
        return job.number in self._jobs

    def add(self, job: Job) -> None:
        """Let a request decode from the next step on."""
        self._jobs[job.number] = job
        job.ends_at_step = self.step + len(job.output) - job.num_output
        heapq.heappush(self._ends, (job.ends_at_step, job.number, job))
        self.context += job.kv_len
        self._limits += job.limit_len - job.num_output + self.step
        if job.limit_len > CLIP_LEN:
            self._long[job.number] = job

    def remove(self, job: Job) -> None:
        """Take a request out, with what it has generated and computed by now."""
        job.kv_len, job.num_output = self.kv_len(job), self.num_output(job)
        del self._jobs[job.number]
        self.context -= job.kv_len
        self._limits -= job.limit_len - job.num_output + self.step
        self._long.pop(job.number, None)

    def advance(self, num_steps: int) -> list[Job]:
        """Make decode steps; take out and return the requests that are done, in the order of arrival."""
        self.step += num_steps
        self.context += num_steps * len(self._jobs)
        done = []
        while self._ends and self._ends[0][0] <= self.step:
            entry = heapq.heappop(self._ends)
            if self._holds(*entry):
                self.remove(entry[2])
                done.append(entry[2])
        return done

    def steps_to_next_end(self) -> int:
        """Return after how many steps the first request is done. Amortised O(log batch)."""
        while not self._holds(*self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] - self.step

    def num_output(self, job: Job) -> int:
        """Return how many tokens a request has generated, running or not."""
        return len(job.output) - (job.ends_at_step - self.step) if job in self else job.num_output

    def kv_len(self, job: Job) -> int:
        """Return how many tokens of a request have KV, running or not."""
        return job.kv_len + self.num_output(job) - job.num_output

    def growth(self, num_steps: int) -> int:
        """Return the tokens to allocate for so many steps. O(1) for pages of one token, else O(batch)."""
        size = self._page_size
        if size == 1:
            return num_steps * len(self._jobs)
        held = [self.kv_len(job) - job.node.end_len for job in self]
        return sum(paged(held_len + num_steps, size) - paged(held_len, size) for held_len in held)

    def most_steps(self, num_steps: int, room: int) -> int:
        """Return for how many steps `room` tokens suffice, at most `num_steps`; they do for one."""
        least, most = 1, num_steps
        while least < most:
            middle = (least + most + 1) // 2
            if self.growth(middle) <= room:
                least = middle
            else:
                most = middle - 1
        return least

    def outstanding_limit(self) -> int:
        """Return the output tokens that are reckoned with of all requests. O(those beyond CLIP_LEN)."""
        beyond = sum(max(0, job.limit_len - self.num_output(job) - CLIP_LEN) for job in self._long.values())
        return self._limits - len(self._jobs) * self.step - beyond

    def least_advanced(self) -> Job:
        """Return the request with the least output; of equals, the one with the longest prompt. O(batch)."""
        return min(self, key=lambda job: (self.num_output(job), -len(job.request.prompt)))

    def check_invariants(self) -> None:
        """Assert that the sums are the sums over the requests. O(batch)."""
        assert self.context == sum(self.kv_len(job) for job in self)
        limits = (min(job.limit_len - self.num_output(job), CLIP_LEN) for job in self)
        assert self.outstanding_limit() == sum(limits)

    def _holds(self, step: int, number: int, job: Job) -> bool:
        """Whether an entry of the ends still holds: its request may have left, and come back."""
        return self._jobs.get(number) is job and job.ends_at_step == step


def remaining_limit(job: Job) -> int:
    """Return the output tokens that one who does not run may still produce, as SGLang reckons with them."""
    return min(job.limit_len - job.num_output, CLIP_LEN)


class ExpectedShare:
    """The share of their limits that running requests are expected to generate, as SGLang reckons it."""

    def __init__(self) -> None:
        self.now = EXPECTED_SHARE

    def decay(self, num_steps: int) -> None:
        """Expect less after decode steps in which nothing went wrong."""
        self.now = max(LEAST_SHARE, self.now - num_steps * (EXPECTED_SHARE - LEAST_SHARE) / DECAY_STEPS)

    def reckon(self, running: DecodeBatch) -> None:
        """Expect what those that run will have generated in a while, as one was retracted. O(batch)."""
        num_output = sum(running.num_output(job) for job in running) + RETRACT_STEPS * len(running)
        self.now = min(1.0, num_output / sum(job.limit_len for job in running))
