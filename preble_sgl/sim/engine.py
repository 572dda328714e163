"""One SGLang runtime at iteration level, without a model: what it computes when, and what its cache holds.

    start(now):   what waits, in the order of the wait queue ─► a prefill batch, chunked, before any decode
                  else one decode step of all that run, or a stretch of steps until something changes
    finish():     tokens appear, requests end, their KV stays in the radix tree

Follows SGLang 0.5.x (`scheduler.py`, `schedule_policy.py`): prefill first; a request is admitted if its new
tokens and the output it may produce fit beside what running requests are expected to need yet (a share of
their limits that decays while nothing goes wrong); the first that does not fit stops the batch; one prompt at
a time is prefilled in chunks; when decoding finds no room, requests with the least output are retracted. The
caller owns the clock: it starts an iteration, and calls `finish` when the instant has come that `start` gave.
A stretch of decode steps is one call, since nothing in it depends on anything but its length; `cut` shortens
it when something arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from preble_sgl.core import CacheEvent, FinishReason, Request, RequestId, TokenIds, Usage
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.sim.decode_batch import DecodeBatch, ExpectedShare
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import EngineLoad, Finished, Job, StepResult, beginning_of, paged
from preble_sgl.sim.kv_cache import TOKEN_BYTES, KvCache
from preble_sgl.sim.pins import Pins
from preble_sgl.sim.prefill_batch import PrefillBatch
from preble_sgl.sim.waiting_line import WaitingLine


@dataclass(slots=True)
class _Iteration:
    """What was started: prefills with their new tokens, and `num_steps` decode steps of all that run."""

    started_at: float
    ends_at: float
    prefills: Sequence[tuple[Job, int]]
    num_steps: int


class Engine:
    """A runtime. Owns its wait queue, its running batch and its KV cache.

    `pins` may change between iterations only.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cache = KvCache(config.kv_tokens, config.page_size, publish=config.publish_every is not None)
        self.pins = Pins(self.cache, config.max_pinned_share)
        self._numbers = count()
        self._jobs: dict[RequestId, Job] = {}
        self._waiting = WaitingLine(config.order, self.cache)
        self._chunked: Job | None = None
        self._running = DecodeBatch(config.page_size)
        self._iteration: _Iteration | None = None
        self._is_full = False
        self._share = ExpectedShare()
        self._aborted: list[Job] = []
        self._finished: list[Finished] = []
        self._told_at_step = 0
        self._prefilled_tokens = 0
        self._prefill_busy_s = 0.0

    # From outside

    def submit(self, request: Request, output: TokenIds, now: float) -> None:
        """Let a request wait. `output`: the tokens it will generate, cut to what it asks for and what fits.

        Raises RequestRejected if its prompt is too long, InputError if its id is that of an unfinished one.
        """
        if request.request_id in self._jobs:
            raise InputError(f"duplicate request id {request.request_id}")
        prompt_len = len(request.prompt)
        if prompt_len > self.max_input_len:
            raise RequestRejected(
                f"call {request.call_path}: a prompt of {prompt_len} tokens is longer than the "
                f"{self.max_input_len} that fit",
                program_id=request.program_id,
                request_id=request.request_id,
                call_path=request.call_path,
            )
        if not self.has_work:
            self._share = ExpectedShare()
        limit_len = min(request.sampling.max_new_tokens, self.max_input_len - prompt_len + 1)
        packed = request.prompt.tobytes()
        self._jobs[request.request_id] = job = Job(
            request=request,
            output=output[:limit_len],
            limit_len=limit_len,
            number=next(self._numbers),
            submitted_at=now,
            node=self.cache.root(request.namespace),
            packed=packed,
            total_len=prompt_len,
            beginning=beginning_of(request, packed),
            arrived_at_len=self._prefilled_tokens,
        )
        self._waiting.join(job)

    def abort(self, request_id: RequestId) -> bool:
        """Take a request out; what it has computed stays cached. Say whether there was one."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return False
        if job in self._waiting:
            self._waiting.leave(job)
        else:
            self._aborted.append(job)
            job.is_aborted = True
            if self._iteration is None:  # else its iteration goes on
                self._drop_aborted()
        return True

    @property
    def max_input_len(self) -> int:
        """The longest prompt that is accepted, in tokens: one token of output must fit, too."""
        fits = self.cache.capacity - self.config.page_size - 1
        return fits if self.config.max_input_len is None else min(fits, self.config.max_input_len)

    @property
    def is_running(self) -> bool:
        """Whether an iteration was started and is not finished."""
        return self._iteration is not None

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._jobs) or self.is_running

    def output_len(self, request_id: RequestId) -> int:
        """Return the tokens that an unfinished request has generated. Raises KeyError for another."""
        return self._running.num_output(self._jobs[request_id])

    def cached_tokens(self, request_id: RequestId) -> int:
        """Return the prompt tokens that an unfinished request found cached. Raises KeyError for another."""
        return self._jobs[request_id].cached_tokens or 0

    def flush_cache(self) -> bool:
        """Forget everything that is cached, pins included; refuse while requests are there."""
        if self.has_work:
            return False
        self.pins.drop_all()
        self.cache.clear()
        return True

    def load(self) -> EngineLoad:
        """Return what the runtime is doing. O(waiting)."""
        return EngineLoad(
            num_running=len(self._jobs) - len(self._waiting),
            num_waiting=len(self._waiting),
            waiting_tokens=sum(job.missing_len for job in self._waiting),
            used_tokens=self.cache.num_locked + self.cache.num_private,
            kv_tokens=self.cache.capacity,
            prefilled_tokens=self._prefilled_tokens,
            prefill_busy_s=self._prefill_busy_s,
        )

    # Iterations

    def start(self, now: float, *, max_decode_steps: int | None = None) -> float | None:
        """Begin what comes next and return when it ends; None if there is nothing to do.

        Decode steps are begun as one stretch, `max_decode_steps` at most, until a request or memory ends.
        """
        assert self._iteration is None, "finish the iteration that runs first"
        self.pins.expire(now)
        prefills = self._next_prefills()
        if not prefills and not self._running and self._waiting and self.pins.drop_all():
            prefills = self._next_prefills()  # a pin starves nobody
        if prefills:
            self._iteration = self._begin_prefill(prefills, now)
        elif self._running:
            self._iteration = self._begin_decodes(now, max_decode_steps)
        else:
            assert not self._waiting, "what was accepted fits an empty cache"
            return None
        return self._iteration.ends_at

    def cut(self, now: float) -> float:
        """End a stretch of decode steps with the first that is over at `now` or later; return its end.

        Called when something arrives or is aborted. Nothing else can be shortened, and a full batch does not
        heed arrivals.
        """
        iteration = self._iteration
        assert iteration is not None, "nothing runs"
        if iteration.num_steps > 1 and (self._aborted or not self._is_full):
            self._shorten(iteration, now)
        return iteration.ends_at

    def finish(self) -> StepResult:
        """Apply what was started: tokens appear, requests end."""
        iteration = self._iteration
        assert iteration is not None, "nothing was started"
        self._iteration = None
        now, prefills = iteration.ends_at, iteration.prefills
        if iteration.num_steps:
            self._decode(iteration.num_steps, now)
        first_tokens = [
            job.request.request_id for job, new_len in prefills if self._prefill(job, new_len, now)
        ]
        self._drop_aborted()
        finished, self._finished = self._finished, []
        return StepResult(now, first_tokens, finished, self._events(bool(prefills)))

    def check_invariants(self) -> None:
        """Assert, between iterations, that the pool holds what the requests hold. O(nodes + requests)."""
        assert self._iteration is None
        self.cache.check_invariants()
        self._running.check_invariants()
        holders = [*self._running, *([self._chunked] if self._chunked else [])]
        assert {job.number for job in (*self._waiting, *holders)} == {
            job.number for job in self._jobs.values()
        }
        assert self.cache.num_private == sum(self._held_len(job) for job in holders)
        num_locks = sum(job.node.parent is not None for job in holders)
        assert self.cache.num_locks == num_locks + self.pins.num_pinned

    # Prefill

    def _next_prefills(self) -> list[tuple[Job, int]]:
        """Choose what to prefill now: the prompt that is under way, then what waits, in order."""
        if self._chunked is None and (self._is_full or not self._waiting):
            return []
        batch = PrefillBatch(
            self.cache,
            chunk_tokens=self.config.chunk_tokens,
            max_prefill_tokens=self.config.max_prefill_tokens,
            num_decodes=len(self._running) if self.config.mixed_chunk else 0,
            reserved_len=self._running.outstanding_limit() * self._share.now,
        )
        if self._chunked is not None:
            self._go_on(self._chunked, batch)
        if self._waiting and not self._is_full and self._chunked is None:
            self._admit(batch)
        return batch.prefills

    def _go_on(self, job: Job, batch: PrefillBatch) -> None:
        """Prefill the next chunk of a prompt; running requests give way if they took its room meanwhile."""
        new_len = batch.next_chunk(job)
        while not self.cache.allocate(paged(new_len, self.config.page_size)):
            self._make_room()
        batch.go_on(job, new_len)
        if job.kv_len + new_len == job.total_len:
            self._chunked = None

    def _admit(self, batch: PrefillBatch) -> None:
        """Add waiting requests in order until one does not fit."""
        self._waiting.sort(self._prefilled_tokens)
        num_admitted = 0
        for job in self._waiting:
            if len(self._running) + len(batch.prefills) >= self.config.max_running:
                self._is_full = True
                break
            self._waiting.match(job)
            verdict = batch.add(job)
            if verdict == "no room":
                self._is_full = bool(self._running or batch.prefills)
            if verdict in ("no room", "no budget"):
                break
            num_admitted += 1
            if job.cached_tokens is None:
                job.cached_tokens = job.matched_len
            if verdict == "chunked":
                self._chunked = job
                break
        self._waiting.let_in(num_admitted)

    def _begin_prefill(self, prefills: list[tuple[Job, int]], now: float) -> _Iteration:
        """Start a prefill batch, with a decode step of the running requests in it if chunks are mixed."""
        num_decodes = len(self._running) if self.config.mixed_chunk else 0
        if num_decodes and self._running.growth(1) > self.cache.num_available:
            num_decodes = 0
        context = self._decode_context() if num_decodes else 0
        shapes = [(new_len, job.kv_len + new_len) for job, new_len in prefills]
        duration_s = self.config.step.seconds(shapes, num_decodes, context)
        self._prefilled_tokens += sum(new_len for _, new_len in prefills)
        self._prefill_busy_s += duration_s
        return _Iteration(now, now + duration_s, prefills, int(num_decodes > 0))

    def _prefill(self, job: Job, new_len: int, now: float) -> bool:
        """Cache what was computed of a prompt; say whether it has its first token now."""
        job.kv_len += new_len
        self._cache_computed(job, job.packed)
        if job.kv_len < job.total_len:
            return False
        is_first = job.first_token_at is None and bool(job.output)
        if is_first:
            job.first_token_at = now
        job.num_output += bool(job.output)
        if job.num_output == len(job.output):
            self._end(job, now)
        else:
            self._running.add(job)
        return is_first and not job.is_aborted

    # Decode

    def _begin_decodes(self, now: float, max_steps: int | None) -> _Iteration:
        if self._running.growth(1) > self.cache.num_available:
            self._retract()
        num_steps = self._running.steps_to_next_end()
        if max_steps is not None:
            num_steps = min(num_steps, max_steps)
        if self._waiting and not self._is_full:
            num_steps = 1  # a retraction has made room, perhaps for one that waits
        if self.config.publish_every is not None:
            untold = self._running.step - self._told_at_step
            num_steps = min(num_steps, max(1, self.config.publish_every - untold))
        num_steps = self._running.most_steps(num_steps, self.cache.num_available)
        iteration = _Iteration(now, now + self._decode_s(num_steps), (), num_steps)
        if self.pins.expires_at is not None:
            self._shorten(iteration, self.pins.expires_at)
        return iteration

    def _shorten(self, iteration: _Iteration, until: float) -> None:
        """End a stretch of decode steps with the first that is over at `until` or later, if there is one."""
        least, most = 1, iteration.num_steps
        while least < most:
            middle = (least + most) // 2
            if iteration.started_at + self._decode_s(middle) >= until:
                most = middle
            else:
                least = middle + 1
        iteration.num_steps = least
        iteration.ends_at = iteration.started_at + self._decode_s(least)

    def _decode_s(self, num_steps: int) -> float:
        return self.config.step.decodes(num_steps, len(self._running), self._decode_context())

    def _decode_context(self) -> int:
        """Return the tokens of KV that a decode step reads.

        Where what is shared is read once, that is the part of the tree that requests lock, and what each has
        beyond it. What a prompt under way and pins lock is counted with it. O(batch) if it is read once.
        """
        context = self._running.context + len(self._running)
        if not self.config.shared_prefix:
            return context
        in_tree = sum(job.node.end_len for job in self._running)
        return context - in_tree + min(in_tree, self.cache.num_locked)

    def _decode(self, num_steps: int, now: float) -> None:
        """Let all that run make decode steps, and end those that are done."""
        has_room = self.cache.allocate(self._running.growth(num_steps))
        assert has_room, "room was found when the steps began"
        self._share.decay(num_steps)
        for job in self._running.advance(num_steps):
            self._end(job, now)

    def _retract(self) -> None:
        """Send running requests back to wait until the others have room for a step."""
        while self._running.growth(1) > self.cache.num_available:
            self._make_room()
        self._share.reckon(self._running)

    def _make_room(self) -> None:
        """Retract one request; drop the pins when none is left that may go."""
        if len(self._running) <= (self._chunked is None):
            had_pins = self.pins.drop_all()
            assert had_pins, "what was accepted fits an otherwise empty cache"
            return
        job = self._running.least_advanced()
        self._running.remove(job)
        self._give_back(job)
        job.retract()
        self._waiting.join(job)

    # The end of a request

    def _end(self, job: Job, now: float) -> None:
        """Keep the KV of a request that is done, and report it unless it was aborted meanwhile."""
        self._cache_computed(job, job.packed_with_output())
        self._give_back(job)
        if job.is_aborted:
            return
        request = job.request
        del self._jobs[request.request_id]
        usage = Usage(len(request.prompt), job.cached_tokens or 0, job.num_output)
        self._waiting.count_service(request, usage)
        reason: FinishReason = "stop" if job.num_output < job.limit_len else "length"
        times = job.submitted_at, job.first_token_at, now
        self._finished.append(Finished(request.request_id, usage, reason, *times, job.num_retractions))

    def _drop_aborted(self) -> None:
        """Let go of aborted requests that are still in prefill or running."""
        for job in self._aborted:
            is_chunked = job is self._chunked
            if is_chunked:
                self._chunked = None
            elif job in self._running:
                self._running.remove(job)
            else:
                continue
            self._cache_computed(job, job.packed if is_chunked else job.packed_with_output())
            self._give_back(job)
        self._aborted.clear()

    def _cache_computed(self, job: Job, packed: bytes) -> None:
        """Move the whole pages that a request has computed from the request into the tree."""
        whole_len = job.kv_len - job.kv_len % self.config.page_size
        if whole_len > job.node.end_len:
            node = self.cache.adopt(job.node, packed[: whole_len * TOKEN_BYTES])
            self.cache.lock(node)
            self.cache.unlock(job.node)
            job.node = node

    def _give_back(self, job: Job) -> None:
        """Free what a request holds and unlock its prefix."""
        self.cache.free(self._held_len(job))
        self.cache.unlock(job.node)
        self._is_full = False

    def _held_len(self, job: Job) -> int:
        return paged(self._running.kv_len(job) - job.node.end_len, self.config.page_size)

    def _events(self, prefilled: bool) -> list[CacheEvent]:
        """Return what is published now: at prefills, when idle, and every so many decode steps."""
        every, step = self.config.publish_every, self._running.step
        if every is None or not (prefilled or not self._jobs or step - self._told_at_step >= every):
            return []
        self._told_at_step = step
        return self.cache.take_events()
