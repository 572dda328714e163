"""One point of a study: sessions that arrive at a rate, under one policy, on so many simulated workers."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from preble_sgl.core import ProgramId, Request, RequestId, RequestRecord, SamplingParams, TokenIds, token_ids
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.global_sched.admission import Mechanisms, Objective
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.global_sched.policies import make_policy
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.profiles import Profile
from preble_sgl.sim.report import Summary, summarise
from preble_sgl.sim.simulator import SimulatedFleet, SimWorker
from preble_sgl.sim.virtual_time import Clock, VirtualTime
from preble_sgl.sim.wait_queue import WaitOrder
from preble_sgl.sim.workloads import Session

OnProgress = Callable[[int], object]
"""Told of how many requests have ended since it was told before."""

PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is simulated. All workers are alike, and so is their local order for every policy.

    `cache_events`: the runtimes tell the scheduler of their caches, as SGLang does when asked to.
    `mechanisms`: what the scheduler does besides, instead of what belongs to the policy's name.
    `prefix_first`: requests wait for a prefix that another one is computing, see `global_sched/prefix_first`.
    `shared_prefix`: the runtimes read a shared prefix once in decode steps; `told_of_sharing`: the scheduler
    counts on it.
    """

    policy: str
    gpus: int
    profile: Profile
    seed: int = 0
    order: WaitOrder = "lpm"
    mixed_chunk: bool = False
    page_size: int = 1
    kv_tokens: int | None = None
    objective: Objective = "throughput"
    cache_events: bool = False
    mechanisms: Mechanisms | None = None
    prefix_first: bool = True
    shared_prefix: bool = False
    told_of_sharing: bool = True

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InputError(f"gpus={self.gpus}: at least 1 is needed")

    def on(self, gpus: int) -> "Setting":
        """Return the same on another number of workers."""
        return replace(self, gpus=gpus)

    def fleet(self, clock: Clock) -> SimulatedFleet:
        """Return the fleet, with empty caches."""
        worker = SimWorker.of(
            "",
            self.profile,
            order=self.order,
            mixed_chunk=self.mixed_chunk,
            page_size=self.page_size,
            kv_tokens=self.kv_tokens or self.profile.kv_tokens,
            publish_every=40 if self.cache_events else None,
            shared_prefix=self.shared_prefix,
            told_of_sharing=self.told_of_sharing,
        )
        return SimulatedFleet(
            self._scheduler(), [worker.named(f"gpu{i:03d}") for i in range(self.gpus)], clock
        )

    def _scheduler(self) -> GlobalScheduler:
        rng, first = random.Random(self.seed), self.prefix_first
        if self.mechanisms is not None:
            policy = make_policy(self.policy)
            return GlobalScheduler(policy, rng=rng, prefix_first=first, mechanisms=self.mechanisms)
        return make_scheduler(self.policy, rng=rng, prefix_first=first, objective=self.objective)


@dataclass(slots=True)
class OpenLoop:
    """Sessions that begin when they arrive, whatever the fleet does; a session's turns follow each other."""

    fleet: SimulatedFleet
    clock: VirtualTime
    sessions: Iterator[Session]
    arrivals: Iterator[float]
    on_progress: OnProgress = lambda num: None
    records: list[RequestRecord] = field(default_factory=list)
    num_failed: int = 0
    _numbers: Iterator[int] = field(default_factory=count)

    def begin(self) -> None:
        """Wait for the next session, if there is one more."""
        arrival = next(self.arrivals, None)
        session = None if arrival is None else next(self.sessions, None)
        if arrival is not None and session is not None:
            self.clock.call_at(arrival, self._arrive, session)

    def _arrive(self, session: Session) -> None:
        number = next(self._numbers)
        self._ask(session, number, 0, token_ids())
        self.begin()

    def _ask(self, session: Session, number: int, turn: int, before: TokenIds) -> None:
        now = session.turns[turn]
        request = Request(
            request_id=RequestId(f"{number:016x}{turn:016x}"),
            program_id=ProgramId(f"{number}"),
            call_path=f"turn{turn}",
            prompt=before + now.new,
            sampling=SamplingParams(max_new_tokens=len(now.output)),
        )

        def on_end(end: RequestRecord | RequestRejected) -> None:
            self._count(end)
            if isinstance(end, RequestRecord) and turn + 1 < len(session.turns):
                at = self.clock.time() + session.turns[turn + 1].pause_s
                self.clock.call_at(at, self._ask, session, number, turn + 1, request.prompt + now.output)

        self.fleet.submit(request, now.output, on_end)

    def _count(self, end: RequestRecord | RequestRejected) -> None:
        if isinstance(end, RequestRecord):
            self.records.append(end)
        else:
            self.num_failed += 1
        if (len(self.records) + self.num_failed) % PROGRESS_EVERY == 0:
            self.on_progress(PROGRESS_EVERY)


def simulate(
    setting: Setting,
    sessions: Iterator[Session],
    arrivals: Iterator[float],
    *,
    num_requests: int,
    on_progress: OnProgress = lambda num: None,
) -> Summary:
    """Run whole sessions, of `num_requests` requests or a few more, and return what came of them.

    Deterministic. Raises InputError for an unknown policy.
    """
    clock = VirtualTime()
    loop = OpenLoop(setting.fleet(clock), clock, _enough(sessions, num_requests), arrivals, on_progress)
    loop.begin()
    clock.run()
    return summarise(loop.records, loop.num_failed, loop.fleet.busy_s)


def _enough(sessions: Iterator[Session], num_requests: int) -> Iterator[Session]:
    """Yield sessions until their turns are `num_requests` or more."""
    num_turns = 0
    for session in sessions:
        if num_turns >= num_requests:
            return
        num_turns += len(session.turns)
        yield session
