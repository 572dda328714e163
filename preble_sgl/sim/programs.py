"""Programs in virtual time: a backend whose fleet is simulated and whose generations are scripted."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import orjson

from preble_sgl.core import (
    Chunk,
    Completion,
    OnChunk,
    PlanHint,
    ProgramId,
    Request,
    RequestRecord,
    TokenIds,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.least_value import least_value
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.sim.distributions import Distribution, draw_len
from preble_sgl.sim.points import Setting
from preble_sgl.sim.report import Summary, summarise
from preble_sgl.sim.simulator import SimulatedFleet
from preble_sgl.sim.virtual_loop import VirtualLoop
from preble_sgl.sim.workloads import random_tokens

T = TypeVar("T")
Answers = Callable[[Request], TokenIds]
"""What a call generates: at most `max_new_tokens` tokens."""


class SimulatedBackend:
    """What programs talk to in a simulation. It is a `dsl.backend.Backend`, so `program.map` runs on it.

    `answers` scripts the generations. Scores of choices are the same for all, so a `select` takes the first.
    """

    def __init__(self, setting: Setting, answers: Answers, *, chat: ChatFormat | None = None) -> None:
        self.loop = VirtualLoop()
        self.fleet: SimulatedFleet = setting.fleet(self.loop)
        self.records: list[RequestRecord] = []
        self.num_failed = 0
        self._answers = answers
        self._chat = chat

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template. Raises InputError if the simulation has none."""
        if self._chat is None:
            raise InputError("this simulation has no tokenizer: give `chat=ChatFormat.load(model_path)`")
        return self._chat

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer one request in virtual time; cancelling aborts it. Raises RequestRejected.

        `on_chunk` gets the whole answer at its end.
        """
        ended: asyncio.Future[RequestRecord | RequestRejected] = self.loop.create_future()
        output = self._answers(request)
        is_over = False

        def on_end(end: RequestRecord | RequestRejected) -> None:
            nonlocal is_over
            is_over = True
            if not ended.done():  # else it is cancelled in the instant of its end
                ended.set_result(end)

        self.fleet.submit(request, output, on_end)
        try:
            end = await ended
        except asyncio.CancelledError:
            if not is_over:
                self.fleet.cancel(request.request_id)
            raise
        if isinstance(end, RequestRejected):
            self.num_failed += 1
            raise end
        self.records.append(end)
        ids = output[: end.usage.output_tokens]
        text = self._chat.decode(ids) if self._chat else ""
        if on_chunk:
            on_chunk(Chunk(ids, text, end.finish_reason, end.usage), 0)
        return Completion(ids, text, end.finish_reason, end.usage, _even_scores(request))

    def begin_program(self, hint: PlanHint) -> None:
        """Tell the scheduler that a program run begins, and what is known of it."""
        self.fleet.begin_program(hint)

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Tell the scheduler that a program run makes no call for about so many seconds."""
        self.fleet.pause(program_id, expected_s)

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Tell the scheduler that a program run will not use so many tokens of its KV again."""
        self.fleet.give_back(program_id, num_tokens)

    def end_program(self, program_id: ProgramId) -> None:
        """Tell the scheduler that a program run makes no more calls."""
        self.fleet.end_program(program_id)

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` in virtual time until it is done."""

        async def work() -> T:
            return await fn()

        asyncio.set_event_loop(self.loop)
        try:
            return self.loop.run_until_complete(work())
        finally:
            asyncio.set_event_loop(None)

    def summary(self) -> Summary:
        """Return what came of all calls so far."""
        return summarise(self.records, self.num_failed, self.fleet.busy_s)

    def close(self) -> None:
        """Cancel what still waits, and close the loop."""
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self.loop.run_until_complete(asyncio.wait(left))
        self.loop.close()


@dataclass(slots=True)
class ScriptedAnswers:
    """Answers for any program: random words of some length, and the least value that a schema allows.

    `output`: how long free text gets, cut to what a call allows; None always uses all that is allowed.
    """

    chat: ChatFormat
    seed: int = 0
    output: Distribution | None = None
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def __call__(self, request: Request) -> TokenIds:
        """Return the tokens of an answer. Raises InputError for a regex, which would need a script."""
        sampling = request.sampling
        if sampling.regex is not None:
            raise InputError(f"call {request.call_path}: a regex needs a script: pass `answers` of your own")
        if sampling.json_schema is not None:
            text = orjson.dumps(least_value(orjson.loads(sampling.json_schema))).decode()
            ids = self.chat.encode(text) + self.chat.encode(self.chat.assistant_end)[:1]
            return ids[: sampling.max_new_tokens]
        limit = sampling.max_new_tokens
        return self._text(limit if self.output is None else min(limit, draw_len(self.output, self._rng)))

    def _text(self, length: int) -> TokenIds:
        """Return tokens of an ordinary text: words, so that every model's tokenizer can decode them."""
        ids = token_ids()
        while len(ids) < length:
            ids += self.chat.encode(f" {self._rng.randrange(10**6)}")
        return ids[:length]


def _even_scores(request: Request) -> tuple[float, ...]:
    if request.score_from is None:
        return ()
    return (-1.0,) * (len(request.prompt) - request.score_from)


def random_answers(seed: int = 0) -> Answers:
    """Return a script that generates random tokens, as many as a call allows."""
    rng = random.Random(seed)
    return lambda request: random_tokens(rng, request.sampling.max_new_tokens)
