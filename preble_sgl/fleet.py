"""The live composition root: programs' calls in, the global scheduler's placements out to runtimes.

    programs ──► Fleet ──► dispatcher.py ◄──► global scheduler
                   │            │                    ▲ cache events, load
                   └── supervisor.py ──► runtimes ───┘ feeds.py

One event loop owns a fleet and everything in it.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from preble_sgl.attempts import Work
from preble_sgl.core import Completion, OnChunk, PlanHint, ProgramId, Request, WorkerId
from preble_sgl.dispatcher import Dispatcher, OnRecord
from preble_sgl.draining import leave
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan
from preble_sgl.errors import InputError, NoWorkerError, UnknownIdError
from preble_sgl.feeds import Feeds
from preble_sgl.fleet_file import DEFAULT_POLICY, FleetPlan, load_fleet
from preble_sgl.global_sched.cost import CostProfile, with_shared_prefix
from preble_sgl.global_sched.make import check_name, make_scheduler
from preble_sgl.machine import launch_specs, profile_of
from preble_sgl.opening import OnLoop, Opening
from preble_sgl.predict import Prediction, WorkerSpec, predict
from preble_sgl.profiles import load_profile
from preble_sgl.remote_fleet import RemoteFleet
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.protocol import Runtime, RuntimeInfo
from preble_sgl.runtime_ext.supervisor import AttachSpec, Supervisor, Watching, supervised

log = logging.getLogger("preble_sgl")

WARM_EVERY_S = 0.2
"""Seconds between looks for workers that could compute ahead what calls to come will use."""


class Fleet(OnLoop):
    """A global scheduler over runtimes. Programs run against it: it is a `dsl.backend.Backend`.

    `profile`: what work costs on the runtimes; `profiles` names those that differ.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        *,
        chat: ChatFormat,
        profile: CostProfile,
        profiles: Mapping[WorkerId, CostProfile] | None = None,
        policy: str = DEFAULT_POLICY,
        seed: int = 0,
        on_record: OnRecord | None = None,
    ) -> None:
        self._chat = chat
        self._profile = profile
        self._profiles = profiles or {}
        self._policy = policy
        self._clock = time.monotonic
        self._supervisor: Supervisor | None = None
        self._draining: set[WorkerId] = set()
        self.takes_programs = True
        self.scheduler = make_scheduler(policy, rng=random.Random(seed))
        self._dispatcher = Dispatcher(
            self.scheduler,
            chat.decode,
            self._clock,
            on_record=on_record,
            on_lost=self._suspect,
            on_faulty=self._leave_alone,
        )
        self._feeds = Feeds(self.scheduler, self._clock)
        for runtime in runtimes:
            self._dispatcher.add(runtime, self._profile_of(runtime.info))

    @classmethod
    def launch(
        cls,
        model_path: str | Path | None = None,
        *,
        runtimes: int | None = None,
        policy: str = DEFAULT_POLICY,
        kv_tokens: int | None = None,
        port: int | None = None,
        extra_args: Sequence[str] = (),
        watching: Watching | None = None,
    ) -> "Opening[Fleet]":
        """Start SGLang runtimes on this machine and keep them running for as long as the context lasts.

        One per GPU, or two on the CPU, unless `runtimes` says otherwise. Without `model_path` a small
        model with random weights is written and used. `kv_tokens` bounds each runtime's KV cache. The
        runtimes listen on `port` and the ports after it, or on free ones. `extra_args` go to SGLang as
        they are. A runtime that dies or hangs is started again, as `watching` says. Use it with `with` or,
        in async code, `async with`.

        Raises InputError (bad arguments) or LaunchError (with the end of the runtime's log).
        """
        specs = launch_specs(model_path, runtimes, kv_tokens, port, tuple(extra_args))
        return cls._opening(FleetPlan(specs=tuple(specs), policy=policy), watching=watching)

    @classmethod
    def attach(
        cls,
        urls: Sequence[str],
        *,
        model_path: str | Path | None = None,
        policy: str = DEFAULT_POLICY,
        watching: Watching | None = None,
    ) -> "Opening[Fleet]":
        """Use SGLang servers that already run and serve the same model. They are never stopped.

        `model_path` is where the tokenizer is read from; by default the path the first server reports.
        Raises InputError (bad arguments, different models) or RuntimeLost (nobody answers).
        """
        if not urls:
            raise InputError("no runtime to attach to: give at least one URL")
        plan = FleetPlan(attach=tuple(AttachSpec(url=url) for url in urls), policy=policy)
        return cls._opening(plan, model_path, watching)

    @classmethod
    def connect(
        cls, url: str, *, model_path: str | Path | None = None, api_key: str | None = None
    ) -> "Opening[RemoteFleet]":
        """Use the fleet that `preble-sgl serve` has at `url`, together with its other users.

        `model_path`: a directory with the model's tokenizer; by default the path that the server reports.
        Raises InputError (no such server, no tokenizer there) or RuntimeLost (nobody answers).
        """
        return RemoteFleet.connect(url, model_path=model_path, api_key=api_key)

    @classmethod
    def load(
        cls, file: str | Path, *, policy: str | None = None, watching: Watching | None = None
    ) -> "Opening[Fleet]":
        """Open the fleet that a `fleet.toml` describes: runtimes to start, servers to attach to, or both.

        `policy` instead of the file's. Raises InputError for what the file says wrong; otherwise as `launch`
        and `attach`.
        """
        plan = load_fleet(Path(file))
        return cls._opening(replace(plan, policy=policy or plan.policy), watching=watching)

    @classmethod
    def _opening(
        cls, plan: FleetPlan, model_path: str | Path | None = None, watching: Watching | None = None
    ) -> "Opening[Fleet]":
        check_name(plan.policy)
        profiles = {worker_id: load_profile(name).cost for worker_id, name in plan.profiles.items()}

        @asynccontextmanager
        async def opened() -> AsyncIterator[Fleet]:
            async with supervised(plan.specs, plan.attach, watching=watching) as supervisor:
                infos = [runtime.info for runtime in supervisor.runtimes]
                models = {info.model_path for info in infos}
                if len(models) > 1:
                    raise InputError(f"the servers run different models: {', '.join(sorted(models))}")
                fleet = cls(
                    supervisor.runtimes,
                    chat=ChatFormat.load(model_path or infos[0].model_path),
                    profile=profile_of(on_cpu=infos[0].device == "cpu"),
                    profiles=profiles,
                    policy=plan.policy,
                )
                async with fleet._opened(supervisor):
                    yield fleet

        return Opening(opened)

    def with_policy(self, policy: str, *, on_record: OnRecord | None = None) -> "Fleet":
        """Return a fleet over the same runtimes with a scheduler that knows nothing yet.

        Do not run calls through both at once: each believes that the runtimes are its own. It does not
        replace runtimes that are lost, and is not told of their caches.
        """
        fleet = Fleet(
            tuple(self._dispatcher.runtimes.values()),
            chat=self._chat,
            profile=self._profile,
            profiles=self._profiles,
            policy=policy,
            on_record=on_record,
        )
        fleet._portal = self._portal
        return fleet

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the fleet's model."""
        return self._chat

    def on_record(self, on_record: OnRecord) -> None:
        """Tell of each call that ends well from now on."""
        self._dispatcher.on_record = on_record

    def num_running(self, worker_id: WorkerId) -> int:
        """Return how many calls run on a worker."""
        return self._dispatcher.num_running(worker_id)

    @property
    def worker_ids(self) -> tuple[WorkerId, ...]:
        """The fleet's workers, in order."""
        return tuple(self._dispatcher.runtimes)

    def describe_workers(self) -> list[dict[str, Any]]:
        """Return what there is to know of each worker, as plain values."""
        infos = {worker_id: runtime.info for worker_id, runtime in self._dispatcher.runtimes.items()}
        return [
            {
                **asdict(worker),
                "url": infos[worker.worker_id].url,
                "version": infos[worker.worker_id].version,
                "num_running": self._dispatcher.num_running(worker.worker_id),
            }
            for worker in self.scheduler.snapshot().workers
        ]

    def now(self) -> float:
        """Return the time on the fleet's clock, in seconds."""
        return self._clock()

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Place and run one request; a lost runtime is survived by going on with it on another.

        `on_chunk` is told of each piece of the answer and, from 0, of the answer that it belongs to: one
        that another runtime cannot go on with begins anew. Cancelling aborts it on its runtime. Raises
        RequestRejected, or NoWorkerError when no runtime is left.
        """
        return await self._dispatcher.generate(request, on_chunk)

    async def run(self, request: Request, work: Work) -> None:
        """Place a request and do `work` on that runtime; otherwise as `generate`."""
        await self._dispatcher.run(request, work)

    def any_runtime(self) -> Runtime:
        """Return a runtime that is up. Raises NoWorkerError."""
        for runtime in self._dispatcher.runtimes.values():
            return runtime
        raise NoWorkerError("no runtime of the fleet is up")

    def begin_program(self, hint: PlanHint) -> None:
        """Tell the scheduler that a program run begins, and what is known of it.

        Raises NoWorkerError once the fleet is closed to programs.
        """
        if not self.takes_programs:
            raise NoWorkerError("the fleet is about to end: it begins no program", program_id=hint.program_id)
        self.scheduler.register_plan(hint, self._clock())

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Tell the scheduler that a program run makes no call for about so many seconds."""
        self.scheduler.on_pause(program_id, expected_s, self._clock())
        self._dispatcher.dispatch()

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Tell the scheduler that a program run will not use so many tokens of its KV again."""
        self.scheduler.on_branch_done(program_id, num_tokens, self._clock())
        self._dispatcher.dispatch()

    def end_program(self, program_id: ProgramId) -> None:
        """Tell the scheduler that a program run makes no more calls."""
        self.scheduler.release_program(program_id, self._clock())
        self._dispatcher.dispatch()

    async def flush_cache(self) -> None:
        """Make every runtime forget its cached prefixes; waits until they are idle."""
        for worker_id, runtime in self._dispatcher.runtimes.items():
            await runtime.flush_cache()
            self.scheduler.on_cache_cleared(worker_id, self._clock())

    async def add(self, server: AttachSpec) -> WorkerId:
        """Use one more server that runs already and serves the same model; return its worker's id.

        Raises InputError (no such server, another model, a name that is taken) or RuntimeLost.
        """
        if self._supervisor is None:
            raise InputError("this fleet looks after no runtimes: open one with launch, attach or load")
        runtime = await self._supervisor.add(server, self)
        info, others = runtime.info, [one.info.model_path for one in self._dispatcher.runtimes.values()]
        if any(model_path != info.model_path for model_path in others):
            await self._supervisor.retire(info.worker_id)
            raise InputError(f"the server runs {info.model_path}, the fleet {others[0]}")
        self.on_runtime_up(runtime)
        return info.worker_id

    async def drain(self, worker_id: WorkerId, *, notice_s: float | None = None) -> None:
        """Place nothing more on a worker, let its calls finish, and end its runtime or let it go.

        With `notice_s`, the seconds until the machine is taken away, what is not finished by then goes on
        elsewhere with the tokens that it has, and what only this worker has cached for calls to come is
        computed elsewhere before. Raises UnknownIdError, or InputError (it drains already, a bad notice).
        """
        if worker_id not in self._dispatcher.runtimes:
            raise UnknownIdError(f"there is no worker {worker_id}; there are: {', '.join(self.worker_ids)}")
        if worker_id in self._draining:
            raise InputError(f"worker {worker_id} drains already")
        if notice_s is not None and not notice_s > 0:
            raise InputError(f"notice_s={notice_s}: must be above 0; leave it out to wait for all calls")
        self._draining.add(worker_id)
        self._dispatcher.watched.discard(worker_id)
        await leave(self._dispatcher, worker_id, notice_s)
        self._feeds.leave(worker_id)
        self._dispatcher.remove(worker_id)
        if self._supervisor:
            await self._supervisor.retire(worker_id)
        self._draining.discard(worker_id)

    def close_to_programs(self) -> None:
        """Begin no program run any more; those that began go on to their end."""
        self.takes_programs = False

    def predict(self, plan: Plan) -> Prediction:
        """Return what this fleet's policy would reuse of `plan`'s prompts, starting from empty caches."""
        infos = [runtime.info for runtime in self._dispatcher.runtimes.values()]
        workers = [WorkerSpec(i.worker_id, i.kv_tokens, i.page_size, self._profile_of(i)) for i in infos]
        return predict(plan, workers, self._policy)

    # What the supervisor tells

    def on_runtime_up(self, runtime: SglangRuntime) -> None:
        """Use a runtime, with a cache that is taken to be empty, unless it is in use or leaves."""
        worker_id = runtime.info.worker_id
        if worker_id not in self._dispatcher.runtimes and worker_id not in self._draining:
            self._dispatcher.watched.add(worker_id)
            self._dispatcher.add(runtime, self._profile_of(runtime.info))
            self._feeds.follow(runtime)
            self._dispatcher.dispatch()

    def on_runtime_down(self, worker_id: WorkerId, why: str) -> None:
        """Let a runtime's calls go on elsewhere."""
        self._feeds.leave(worker_id)
        self._dispatcher.remove(worker_id)

    def on_runtime_gone(self, worker_id: WorkerId) -> None:
        """Do not let calls wait for a runtime any longer."""
        self._dispatcher.watched.discard(worker_id)
        self._dispatcher.dispatch()

    def _suspect(self, worker_id: WorkerId) -> None:
        self._feeds.leave(worker_id)
        if self._supervisor:
            self._supervisor.suspect(worker_id)

    def _leave_alone(self, worker_id: WorkerId, pause_s: float) -> None:
        """Use a runtime that fails at everything no more, and try again after a pause."""
        log.warning("runtime %s fails at everything: left alone for %g s", worker_id, pause_s)
        self._feeds.leave(worker_id)
        if self._supervisor:
            asyncio.get_running_loop().call_later(pause_s, self._supervisor.suspect, worker_id)

    def _profile_of(self, info: RuntimeInfo) -> CostProfile:
        profile = self._profiles.get(info.worker_id, self._profile)
        return with_shared_prefix(profile) if info.shared_prefix else profile

    @asynccontextmanager
    async def _opened(self, supervisor: Supervisor | None = None) -> AsyncIterator[Self]:
        """Watch the runtimes, and leave only when no attempt is under way any more."""
        self._supervisor = supervisor
        if supervisor:
            self._dispatcher.watched.update(self._dispatcher.runtimes)
            for runtime in supervisor.runtimes:
                self._feeds.follow(runtime)
            supervisor.watch(self)
        warming = asyncio.create_task(self._warm_cold_workers())
        try:
            await self._feeds.catch_up()
            yield self
        finally:
            warming.cancel()
            await self._dispatcher.close()
            await self._feeds.close()

    async def _warm_cold_workers(self) -> None:
        while True:
            await asyncio.sleep(WARM_EVERY_S)
            for warm_up in self.scheduler.warming.propose():
                self._dispatcher.warm(warm_up)
