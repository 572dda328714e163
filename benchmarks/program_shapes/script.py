"""Programs as data: what a run says, generates, forks and waits for, with every token fixed beforehand.

    script = Script("judge", (Say(document), Fork(((Say(question), Gen(note, 64)), ...)), Gen(verdict, 256)))
    run_scripts(setting, [script, ...], rows=64)

A script is played as a coroutine on a `SimulatedBackend`, and tells the scheduler what the DSL tells it: a
hint when it begins (`dsl/plan.py`: what a traced body would know), room given back when branches join, the
end. Besides, it tells of its pauses. Because nothing depends on when things happen, every policy is asked for
the same tokens, and what a run needs at most can be told without running it.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from preble_sgl.core import (
    PlanHint,
    ProgramId,
    Request,
    RequestId,
    RequestRecord,
    SamplingParams,
    TokenIds,
    token_ids,
)
from preble_sgl.sim.points import Setting
from preble_sgl.sim.programs import SimulatedBackend
from preble_sgl.sim.report import Summary
from preble_sgl.sim.workloads import Session


@dataclass(frozen=True, slots=True, eq=False)
class Say:
    """Add tokens to the conversation."""

    ids: TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Gen:
    """Make a call that generates `output`; it is allowed `limit` tokens, which is all that a plan knows."""

    output: TokenIds
    limit: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for a tool. `expected_s`: what the scheduler is told; the mean over that tool's runs."""

    seconds: float
    expected_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Fork:
    """Go on in branches at once; then without what they have added."""

    branches: tuple["Steps", ...]


Step: TypeAlias = Say | Gen | Pause | Fork
Steps: TypeAlias = tuple[Step, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """One program run. `at`: when it begins, in seconds."""

    name: str
    steps: Steps
    at: float = 0.0
    tenant: str = "default"

    @property
    def kv_tokens(self) -> int:
        """The most KV tokens that it may ever hold: all it says, and all it is allowed to generate."""
        return _most_tokens(self.steps)

    @property
    def known_beginning(self) -> TokenIds:
        """The longest beginning of a prompt that is known before anything is generated."""
        return _known_beginning(self.steps)

    @property
    def num_calls(self) -> int:
        """Calls that it makes."""
        return len(list(self.calls()))

    def calls(self) -> Iterator[tuple[int, int]]:
        """Yield the length of each call's prompt and output."""
        return _calls(self.steps, 0)

    def ends(self) -> Iterator[TokenIds]:
        """Yield the conversation at the end of every branch and of the run."""
        return _ends(self.steps, token_ids())

    def hint(self, program_id: ProgramId) -> PlanHint:
        """Return what the scheduler may know of it."""
        return PlanHint(program_id=program_id, kv_tokens=self.kv_tokens, prefixes=(self.known_beginning,))


def of_session(session: Session, name: str, *, at: float, limit: int, tenant: str = "default") -> Script:
    """Return a session of a workload as a script; its calls may generate `limit` tokens, or what they do."""
    steps: list[Step] = []
    for turn in session.turns:
        pause = [Pause(turn.pause_s, turn.pause_s)] if turn.pause_s else []
        steps += [*pause, Say(turn.new), Gen(turn.output, max(limit, len(turn.output)))]
    return Script(name, tuple(steps), at, tenant)


# Reading


def _most_tokens(steps: Steps) -> int:
    total = 0
    for step in steps:
        match step:
            case Say(ids):
                total += len(ids)
            case Gen(_, limit):
                total += limit
            case Fork(branches):
                total += sum(map(_most_tokens, branches))
    return total


def _known_beginning(steps: Steps) -> TokenIds:
    known = token_ids()
    for step in steps:
        match step:
            case Say(ids):
                known += ids
            case Gen():
                break
            case Fork(branches):
                return known + max(map(_known_beginning, branches), key=len)
    return known


def _calls(steps: Steps, length: int) -> Iterator[tuple[int, int]]:
    for step in steps:
        match step:
            case Say(ids):
                length += len(ids)
            case Gen(output, _):
                yield length, len(output)
                length += len(output)
            case Fork(branches):
                for branch in branches:
                    yield from _calls(branch, length)


def _ends(steps: Steps, ids: TokenIds) -> Iterator[TokenIds]:
    for step in steps:
        match step:
            case Say(new) | Gen(new, _):
                ids = ids + new
            case Fork(branches):
                for branch in branches:
                    yield from _ends(branch, ids)
    yield ids


# Running


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a batch. `busy_share`: of the time of all workers, what they computed."""

    summary: Summary
    records: Sequence[RequestRecord]
    busy_share: float


class ScriptBackend(SimulatedBackend):
    """A simulated backend that generates what scripts say; `outputs` are those of calls under way."""

    def __init__(self, setting: Setting) -> None:
        self.outputs: dict[RequestId, TokenIds] = {}
        super().__init__(setting, lambda request: self.outputs.pop(request.request_id))


def run_scripts(setting: Setting, scripts: Sequence[Script], *, rows: int | None = None) -> Outcome:
    """Run all scripts, each from its instant on, at most `rows` at a time; deterministic."""
    backend = ScriptBackend(setting)
    try:
        backend.call(lambda: run_all(backend, scripts, rows))
        backend.fleet.check_invariants()
        summary = backend.summary()
        busy_s = sum(backend.fleet.busy_s.values())
        return Outcome(summary, backend.records, busy_s / (setting.gpus * summary.makespan_s))
    finally:
        backend.close()


async def run_all(backend: ScriptBackend, scripts: Sequence[Script], rows: int | None = None) -> None:
    """Run scripts to their ends; the number of a script is its program id, in eight hex digits."""
    slots = asyncio.Semaphore(rows or len(scripts))

    async def run(number: int, script: Script) -> None:
        await asyncio.sleep(script.at)
        async with slots:
            await _Run(backend, script, ProgramId(f"{number:08x}")).run()

    async with asyncio.TaskGroup() as group:
        for number, script in enumerate(scripts):
            group.create_task(run(number, script))


class _Run:
    """One script being played."""

    def __init__(self, backend: ScriptBackend, script: Script, program_id: ProgramId) -> None:
        self._backend = backend
        self._script = script
        self._program_id = program_id
        self._numbers = count()

    async def run(self) -> None:
        """Play it from its beginning to its end."""
        self._backend.begin_program(self._script.hint(self._program_id))
        try:
            await self._play(self._script.steps, token_ids(), self._script.name)
        finally:
            self._backend.end_program(self._program_id)

    async def _play(self, steps: Steps, ids: TokenIds, path: str) -> int:
        """Play the steps of one branch behind `ids`; return how long its conversation has become."""
        for step in steps:
            match step:
                case Say(new):
                    ids = ids + new
                case Gen(output, limit):
                    await self._generate(ids, output, limit, path)
                    ids = ids + output
                case Pause(seconds, expected_s):
                    self._backend.fleet.pause(self._program_id, expected_s)
                    await asyncio.sleep(seconds)
                case Fork(branches):
                    await self._fork(branches, ids, path)
        return len(ids)

    async def _fork(self, branches: Sequence[Steps], ids: TokenIds, path: str) -> None:
        todo = [self._play(branch, ids, f"{path}.{i}") for i, branch in enumerate(branches)]
        lens = await asyncio.gather(*todo)
        self._backend.give_back(self._program_id, sum(length - len(ids) for length in lens))

    async def _generate(self, prompt: TokenIds, output: TokenIds, limit: int, path: str) -> None:
        number = next(self._numbers)
        request = Request(
            request_id=RequestId(f"{self._program_id}{number:08x}"),
            program_id=self._program_id,
            call_path=f"{path}/call{number}",
            prompt=prompt,
            sampling=SamplingParams(max_new_tokens=limit),
            tenant=self._script.tenant,
        )
        self._backend.outputs[request.request_id] = output
        await self._backend.generate(request)
