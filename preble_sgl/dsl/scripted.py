"""A backend whose answers are written down beforehand, to test programs without a model.

It has no sockets and no clock, so a test of a program takes milliseconds and has the same numbers each time.
What can be counted is counted as a runtime with unlimited memory would: prompts, outputs, and the tokens that
one prefix cache would have saved if it never forgot anything.
"""

import asyncio
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from copy import copy
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias, TypeVar

import orjson

from preble_sgl.core import (
    Chunk,
    Completion,
    FinishReason,
    OnChunk,
    PlanHint,
    ProgramId,
    Request,
    SamplingParams,
    TokenIds,
    TokenLogprob,
    Usage,
    common_prefix_len,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.least_value import least_value
from preble_sgl.errors import InputError, PrebleError, RequestRejected

T = TypeVar("T")

LIKELY, UNLIKELY = -0.1, -1.0
"""Log-probability of each token of the choice that the script takes, and of each token of the others."""

SHOWN_LEN = 200
"""Characters of a prompt, from its end, that an error shows."""

_USED_UP = object()
_ROW = re.compile(r"^(\w+)\[\d+\]")
_PIECE = re.compile(r"\S+\s*|\s+")


class Least(Enum):
    """The answer that nobody has to write; use `LEAST`."""

    LEAST = "least"


LEAST: Final = Least.LEAST
"""As an answer: a small value that fits the type asked for, or `x` for free text."""

Script: TypeAlias = Mapping[str, Any] | Callable[[Request, str], Any]


class ScriptedBackend:
    """Answers the calls of programs from a script, and remembers them. It is a `dsl.backend.Backend`.

    `script` maps patterns of call paths to answers. A pattern is compared as in `fnmatch` with the call path
    less the row: `judge/notes.1/call0`, `judge/verdict`. So `"judge/notes.*"`, `"*/verdict"` and `"*"` all
    work, and the first one that fits wins. Or it is a function `(request, prompt text) -> answer`; None then
    means that it has none. An answer is one of:

    - a text, which is what the model writes: JSON where a type is asked for;
    - a pydantic model, dataclass, dict, list or number: written as JSON;
    - an iterator of answers, one per call: `iter(["first", "second"])`;
    - a function of the prompt's text that returns an answer;
    - an exception, which is raised;
    - `LEAST`: a small value that fits the type asked for.

    A `select` takes the choice that is the answer to its call path (`judge/call0`), the first one if there
    is no such choice; `logprobs(prompt text, choice)`, if given, says instead how likely each token of a
    choice is. What a choice is worth without its prompt, for `rule="vs_prior"`, is then asked as well; else
    it is the same for all. Prompt texts come without special tokens.

    `chat` is `ChatFormat.of_bytes()` unless given. An answer that is too long is cut; with `ignore_eos`, one
    that is too short is repeated. For assertions: `requests` and `completions` in the order in which calls
    began and finished, `calls` (their paths, with the row), `hints`, `pauses` (seconds), `given_back`
    (tokens) and `ended`.

    A call that the script has no answer to raises RequestRejected, and one for which an iterator has no more
    answers PrebleError. LEAST for a regex, and an answer that cannot be written as JSON, raise InputError.
    """

    def __init__(
        self,
        script: Script,
        *,
        chat: ChatFormat | None = None,
        logprobs: Callable[[str, str], float] | None = None,
    ) -> None:
        if not isinstance(script, Mapping) and not callable(script):
            raise InputError(
                'a script is a dict such as {"*": "fine"} or a function (request, text) -> answer'
            )
        self.chat = chat or ChatFormat.of_bytes()
        self.requests: list[Request] = []
        self.completions: list[Completion] = []
        self.hints: list[PlanHint] = []
        self.pauses: list[float] = []
        self.given_back: list[int] = []
        self.ended: list[ProgramId] = []
        self._script = script
        self._logprobs = logprobs
        self._chosen: dict[tuple[ProgramId, str], str | None] = {}
        self._caches: defaultdict[str, PrefixSet] = defaultdict(PrefixSet)

    @property
    def calls(self) -> list[str]:
        """The paths of all calls, in the order in which they began; one per choice of a `select`."""
        return [request.call_path for request in self.requests]

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer one request after the other tasks had their turn, word by word if `on_chunk` is given."""
        self.requests.append(request)
        cache = self._caches[request.namespace]
        cached_len = min(cache.match_len(request.prompt), (request.score_from or len(request.prompt)) - 1)
        cache.add(request.prompt)
        await asyncio.sleep(0)
        if request.score_from is not None:
            done = self._scored(request, request.score_from, cached_len)
        else:
            done = self._written(request, cached_len)
        if on_chunk:
            await stream_out(done, on_chunk)
        cache.add(request.prompt + done.output_ids[:-1])  # the last token is never computed
        self.completions.append(done)
        return done

    def begin_program(self, hint: PlanHint) -> None:
        """Remember the hint."""
        self.hints.append(hint)

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Remember how long."""
        self.pauses.append(expected_s)

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Remember how many tokens."""
        self.given_back.append(num_tokens)

    def end_program(self, program_id: ProgramId) -> None:
        """Remember the end."""
        self.ended.append(program_id)

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on an event loop of its own."""
        return call_on_own_loop(fn)

    def _written(self, request: Request, cached_len: int) -> Completion:
        found = self._found(request)
        if found is None:
            raise self._unanswered(request)
        ids, text, finish_reason = self._cut(self._text(request, *found), request.sampling)
        usage = Usage(len(request.prompt), cached_len, len(ids))
        return Completion(ids, text, finish_reason, usage, output_logprobs=_output_logprobs(request, ids))

    def _scored(self, request: Request, start: int, cached_len: int) -> Completion:
        choice = request.prompt[start:]
        if self._logprobs:
            logprob = self._logprobs(self._said(request), self.chat.decode(choice))
        else:
            chosen = self._choice(request)
            logprob = LIKELY if chosen is not None and self.chat.encode(chosen) == choice else UNLIKELY
        usage = Usage(len(request.prompt), cached_len, 0)
        return Completion(token_ids(), "", "length", usage, (logprob,) * len(choice))

    def _choice(self, request: Request) -> str | None:
        """Return what the script chooses, None for nothing; it is asked once for all choices of a `select`.

        Without prompts all choices are alike, so that what is chosen is the answer by every rule.
        """
        path = request.call_path.rpartition(":")[0]
        select = request.program_id, path
        if path.endswith("/prior") and (request.program_id, path.removesuffix("/prior")) in self._chosen:
            return None
        if select not in self._chosen:
            found = self._found(request)
            self._chosen[select] = None if found is None else self._text(request, *found)
        return self._chosen[select]

    def _found(self, request: Request) -> tuple[str, Any] | None:
        """Return the answer of the script, and what to call the place where it stands."""
        if not isinstance(self._script, Mapping):
            answer = self._script(request, self._said(request))
            return None if answer is None else ("the script", answer)
        path = without_row(request.call_path)
        if request.score_from is not None:
            path = path.rpartition(":")[0]
        fitting = (pattern for pattern in self._script if fnmatchcase(path, pattern))
        pattern = next(fitting, None)
        return None if pattern is None else (f'"{pattern}"', self._script[pattern])

    def _text(self, request: Request, place: str, answer: Any) -> str:
        """Return what an answer says. Raises what it is if it is an exception."""
        while not isinstance(answer, str):
            if isinstance(answer, PrebleError):
                raise copy(answer)  # each call's error is told where it happened
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Iterator):
                answer = next(answer, _USED_UP)
            elif callable(answer):
                answer = answer(self._said(request))
            elif answer is _USED_UP:
                raise PrebleError(
                    f"call {request.call_path}: {place} has no more answers; give it one per call"
                )
            else:
                answer = _least_text(request) if answer is LEAST else _as_json(request, place, answer)
        return answer

    def _cut(self, text: str, sampling: SamplingParams) -> tuple[TokenIds, str, FinishReason]:
        """Return the tokens of a generation that wants to say `text`, what it says, and why it ends."""
        limit = sampling.max_new_tokens
        if sampling.ignore_eos:
            ids = self._repeated(text, limit)
            return ids, self.chat.decode(ids), "length"
        shown, written = _until_stop(text, sampling.stop)
        ids = self.chat.encode(text if written is None else written)
        if len(ids) > limit:
            return ids[:limit], self.chat.decode(ids[:limit]), "length"
        if written is None and len(ids) < limit:
            ids = ids + self.chat.encode(self.chat.assistant_end)[:1]
        return ids, shown, "stop"

    def _repeated(self, text: str, length: int) -> TokenIds:
        ids = self.chat.encode(text or "x")
        return (ids * (length // len(ids) + 1))[:length]

    def _said(self, request: Request) -> str:
        """Return the text before the answer."""
        return self.chat.decode(request.prompt[: request.score_from])

    def _unanswered(self, request: Request) -> RequestRejected:
        patterns = (
            ", ".join(f'"{pattern}"' for pattern in self._script) if isinstance(self._script, Mapping) else ""
        )
        return RequestRejected(
            f"call {request.call_path}: the script has no answer to it"
            + (f"; its patterns are {patterns}" if patterns else "")
            + f". The prompt ends in {self._said(request)[-SHOWN_LEN:]!r}",
            program_id=request.program_id,
            request_id=request.request_id,
            call_path=request.call_path,
        )


class PrefixSet:
    """Sequences of tokens, and how much of another one any of them begins with.

    They are kept packed and sorted by their bytes, so the one that shares most with another stands next to
    where that would stand. One that begins another is not kept.
    """

    def __init__(self) -> None:
        self._packed: list[bytes] = []

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, ids: TokenIds) -> None:
        """Add a sequence. O(n) moves and O(log n) comparisons."""
        packed = ids.tobytes()
        at = bisect_left(self._packed, packed)
        if at < len(self._packed) and self._packed[at].startswith(packed):
            return
        if at and packed.startswith(self._packed[at - 1]):
            self._packed[at - 1] = packed
        else:
            self._packed.insert(at, packed)

    def match_len(self, ids: TokenIds) -> int:
        """Return how many tokens `ids` shares with the beginning of any sequence. O(log n) comparisons."""
        packed = ids.tobytes()
        at = bisect_left(self._packed, packed)
        neighbours = self._packed[max(0, at - 1) : at + 1]
        return max((common_prefix_len(packed, known) for known in neighbours), default=0)

    def check_invariants(self) -> None:
        """Assert that sequences are sorted and none begins the next."""
        for one, following in zip(self._packed, self._packed[1:], strict=False):
            assert one < following
            assert not following.startswith(one)


def without_row(call_path: str) -> str:
    """Return a call path as it is in every row: `judge[3]/call0` becomes `judge/call0`."""
    return _ROW.sub(r"\1", call_path)


async def stream_out(done: Completion, on_chunk: OnChunk) -> None:
    """Tell `on_chunk` of an answer word by word, its tokens spread evenly; other tasks run in between."""
    pieces = _PIECE.findall(done.text) or [""]
    starts = [len(done.output_ids) * i // len(pieces) for i in range(len(pieces) + 1)]
    for i, piece in enumerate(pieces[:-1]):
        on_chunk(Chunk(done.output_ids[starts[i] : starts[i + 1]], piece), 0)
        await asyncio.sleep(0)
    rest = done.output_ids[starts[-2] :]
    on_chunk(Chunk(rest, pieces[-1], done.finish_reason, done.usage, done.logprobs, done.output_logprobs), 0)


def call_on_own_loop(fn: Callable[[], Awaitable[T]]) -> T:
    """Run `fn` on a new event loop in another thread and wait, whether or not a loop runs in this one."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        return portal.call(fn)


def _until_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that ends first, and the text with it; None without one."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    end, at = min(found)
    return text[:at], text[:end]


def _least_text(request: Request) -> str:
    sampling = request.sampling
    if sampling.regex is not None:
        raise InputError(f"call {request.call_path}: LEAST cannot answer a regex or choices: script a text")
    if sampling.json_schema is None:
        return "x"
    return orjson.dumps(least_value(orjson.loads(sampling.json_schema))).decode()


def _as_json(request: Request, place: str, answer: Any) -> str:
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(answer).decode()
    except PydanticSerializationError as error:
        what = f"an answer of type {type(answer).__name__}"
        raise InputError(
            f"call {request.call_path}: {place} has {what}, which is not JSON: give a text ({error})"
        ) from error


def _output_logprobs(request: Request, ids: TokenIds) -> tuple[TokenLogprob, ...]:
    """Return how likely each token is, as far as asked: there are no others in its place."""
    if request.num_top_logprobs is None:
        return ()
    return tuple(TokenLogprob(i, LIKELY, ((i, LIKELY),)[: request.num_top_logprobs]) for i in ids)
