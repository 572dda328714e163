"""Running a program for real: every call goes to the backend."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from preble_sgl.core import Chunk, Completion, FinishReason, ProgramId, Request, Usage
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.calls import CallSite
from preble_sgl.dsl.conversation import Conversation, Encode
from preble_sgl.dsl.events import CallEnded, CallStarted, Event, TextDelta, ToolEnded, ToolStarted
from preble_sgl.dsl.ops import Gen, Selection
from preble_sgl.dsl.retry import NEVER, Retry
from preble_sgl.dsl.schema import parse
from preble_sgl.dsl.tools import Tool, ToolCall, Turn, read_turn
from preble_sgl.errors import DeadlineError, OutputError, PrebleError, ToolError

T = TypeVar("T")

ASSUMED_TOOL_S = 1.0
"""Seconds that a tool is assumed to take before one of its calls was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call of a run. `line`: where it stands in the program. `after`: the calls before it, by number."""

    path: str
    line: str
    usage: Usage
    finish_reason: FinishReason
    attempts: int
    after: tuple[int, ...]
    is_duplicate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a run is run. `timeout_s` is for each call. `tool_s` says how long a tool takes, in seconds.

    `predict` says how many output tokens to expect of a call, made at a line of the program.
    """

    seed: int = 0
    retry: Retry = NEVER
    timeout_s: float | None = None
    on_event: Callable[[Event], None] | None = None
    on_call: Callable[[CallRecord], None] | None = None
    tool_s: Callable[[str], float | None] = lambda name: None
    predict: Callable[[Request, str], float | None] = lambda request, line: None


class Runner:
    """Answers the calls of one program run from a backend, and writes them down.

    `failed_call` is the path of the last call that failed for good, `failed_attempts` how often it was tried.
    """

    def __init__(
        self, backend: Backend, program_id: ProgramId, settings: RunSettings, row: int | None = None
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._row = row
        self._num_started = 0
        self.program_id = program_id
        self.calls: list[CallRecord] = []
        self.tools: list[tuple[str, float]] = []
        self.failed_call: str | None = None
        self.failed_attempts = 0

    @property
    def encode(self) -> Encode:
        """The model's tokenizer."""
        return self._backend.chat.encode

    @property
    def usage(self) -> Usage:
        """Token counts of all finished calls."""
        return sum((call.usage for call in self.calls), Usage())

    async def answer(
        self, request: Request, site: CallSite, op: Gen[Any] | None, conversation: Conversation
    ) -> tuple[int, Completion, Any]:
        """Ask the backend, again if the retry policy says so. Raises what the last attempt raised."""
        number, self._num_started = self._num_started, self._num_started + 1
        request = self._with_expectation(request, site.line)
        self._emit(CallStarted, request, call=request.call_path)
        num_attempts = 0

        async def attempt() -> tuple[Completion, Any]:
            nonlocal num_attempts
            num_attempts += 1
            completion = await self._attempt(request, op, num_attempts)
            return completion, _read(op, completion)

        try:
            completion, value = await self._settings.retry.run(attempt)
        except Exception as error:
            self.failed_call, self.failed_attempts = request.call_path, num_attempts
            _locate(error, request)
            raise
        self._finish(request, site, completion, num_attempts)
        return number, completion, value

    def _with_expectation(self, request: Request, line: str) -> Request:
        """Return a request that says how long its answer may get, if the program did not say but is known."""
        if request.expected_output_len is not None:
            return request
        predicted = self._settings.predict(request, line)
        return request if predicted is None else replace(request, expected_output_len=round(predicted))

    async def _attempt(self, request: Request, op: Gen[Any] | None, number: int) -> Completion:
        """Ask once. Each attempt has a seed of its own, and from the second on an id of its own."""
        limit = self._settings.timeout_s if op is None or op.timeout_s is None else op.timeout_s
        asked = self._seeded(request, number)
        if number > 1:
            asked = replace(asked, request_id=_id_of_attempt(request, number))
        try:
            async with asyncio.timeout(limit):
                return await self._backend.generate(asked, self._listener(asked, number))
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {limit:g} s") from error

    def _seeded(self, request: Request, number: int) -> Request:
        """Give a sampled text a seed: one per run seed, call path (with the row in it) and attempt."""
        sampling = request.sampling
        if sampling.temperature == 0 or sampling.seed is not None:
            return request
        seed = derive_seed(self._settings.seed, request.call_path, number - 1)
        return replace(request, sampling=replace(sampling, seed=seed))

    def _listener(self, request: Request, attempt: int) -> Callable[[Chunk, int], None] | None:
        if self._settings.on_event is None:
            return None
        tries = attempt * 1000  # attempts of ours; a fleet counts its own, after lost runtimes, within each

        def on_chunk(chunk: Chunk, inner: int) -> None:
            if chunk.text:
                self._emit(TextDelta, request, call=request.call_path, text=chunk.text, attempt=tries + inner)

        return on_chunk

    def _finish(self, request: Request, site: CallSite, done: Completion, attempts: int) -> None:
        record = CallRecord(
            path=request.call_path,
            line=site.line,
            usage=done.usage,
            finish_reason=done.finish_reason,
            attempts=attempts,
            after=site.after,
            is_duplicate=done.is_duplicate,
        )
        self.calls.append(record)
        ended = {"text": done.text, "finish_reason": done.finish_reason, "usage": done.usage}
        self._emit(CallEnded, request, call=request.call_path, **ended)
        if self._settings.on_call:
            self._settings.on_call(record)

    def _emit(self, kind: Callable[..., Event], request: Request, **fields: Any) -> None:
        if self._settings.on_event:
            branch = request.call_path.rpartition("/")[0]
            self._settings.on_event(kind(run=self.program_id, row=self._row, branch=branch, **fields))

    def branches_done(self, num_tokens: int) -> None:
        """Tell the backend."""
        self._backend.give_back(self.program_id, num_tokens)

    def pause(self, expected_s: float) -> None:
        """Tell the backend."""
        self._backend.pause(self.program_id, expected_s)

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Take the best score; the earlier choice wins a tie."""
        best = max(range(len(choices)), key=lambda i: scores[i])
        return Selection(choices[best], choices, scores)

    def turn(self, value: Any, tools: Sequence[Tool[..., Any]], final: Any) -> Turn[Any]:
        """Validate what the model wrote."""
        return read_turn(value, tools, final)

    async def use(self, calls: Sequence[ToolCall], max_parallel: int, path: str) -> list[str]:
        """Call tools side by side; what one raises is its result."""
        if calls:
            self.pause(max(self._settings.tool_s(call.tool.name) or ASSUMED_TOOL_S for call in calls))
        gate = asyncio.Semaphore(max_parallel)
        return await self.gather([self._use(call, gate, path) for call in calls])

    async def _use(self, call: ToolCall, gate: asyncio.Semaphore, path: str) -> str:
        async with gate:
            self._tell_of_tool(ToolStarted, path, call)
            started_at = time.monotonic()
            try:
                result = _as_text(await call.tool.result(call.arguments))
            except ToolError as error:
                result = f"error: {error}"
            duration_s = time.monotonic() - started_at
        result = self._cut(result, call.tool.max_len)
        self.tools.append((call.tool.name, duration_s))
        self._tell_of_tool(ToolEnded, path, call, result=result, duration_s=duration_s)
        return result

    def _tell_of_tool(self, kind: Callable[..., Event], path: str, call: ToolCall, **fields: Any) -> None:
        if self._settings.on_event:
            who = {"run": self.program_id, "row": self._row, "branch": path, "tool": call.tool.name}
            self._settings.on_event(kind(**who, **fields))

    def _cut(self, text: str, max_len: int) -> str:
        """Return the beginning of `text`, at most so many tokens of it."""
        ids = self.encode(text)
        return text if len(ids) <= max_len else self._backend.chat.decode(ids[:max_len])

    async def gather(self, awaitables: Sequence[Awaitable[T]]) -> list[T]:
        """Await all at once; the first error cancels the rest and is raised as itself."""
        if len(awaitables) == 1:
            return [await awaitables[0]]
        first_error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_as_coroutine(awaitable)) for awaitable in awaitables]
        except BaseExceptionGroup as errors:
            first_error = errors.exceptions[0]
        if first_error is not None:
            raise first_error
        return [task.result() for task in tasks]


def derive_seed(seed: int, call_path: str, sample: int) -> int:
    """Return 31 bits that differ from call to call and are the same in every run with `seed`."""
    digest = hashlib.blake2b(f"{seed}\0{call_path}\0{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _id_of_attempt(request: Request, number: int) -> Any:
    """Return an id as long as the first attempt's, since SGLang aborts by prefix."""
    return hashlib.blake2b(f"{request.request_id}{number}".encode(), digest_size=16).hexdigest()


def _read(op: Gen[Any] | None, completion: Completion) -> Any:
    """Return the value of a completion. Raises OutputError when it does not fit."""
    if op is None:
        return None
    if op.choices and completion.text not in op.choices:
        raise OutputError(f"{completion.text!r} is none of the choices: raise max_tokens")
    return parse(op.type_, completion.text)


def _locate(error: Exception, request: Request) -> None:
    """Say in an error of ours which program run and call it belongs to."""
    if isinstance(error, PrebleError):
        error.program_id = error.program_id or request.program_id
        error.request_id = error.request_id or request.request_id
        error.call_path = error.call_path or request.call_path


def _as_text(result: Any) -> str:
    """Return a tool's result as the model is shown it: text as it is, anything else as JSON."""
    if isinstance(result, str):
        return result
    from pydantic_core import to_json

    return to_json(result, fallback=str).decode()


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable
