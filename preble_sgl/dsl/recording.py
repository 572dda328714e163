"""Recordings of the calls of programs: made once with a model, answered from ever after without one.

A recording is a file of JSON lines, one per call that finished. A call is answered from it if it has the same
prompt, token for token, and is sampled in the same way; one that differs is refused with a diff, so that a
test says what became of a prompt. Nothing is guessed.
"""

import asyncio
import hashlib
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from difflib import unified_diff
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, TypeVar

from preble_sgl.core import (
    Completion,
    FinishReason,
    Message,
    OnChunk,
    PlanHint,
    ProgramId,
    Request,
    SamplingParams,
    TokenLogprob,
    Usage,
    common_prefix_len,
    token_ids,
)
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.scripted import call_on_own_loop, stream_out, without_row
from preble_sgl.errors import InputError, ReplayMiss

T = TypeVar("T")

DIFF_LINES = 20
"""Lines of a diff that an error shows."""

LINE_CHARS = 100
"""Characters after which a line of a prompt goes on in the next line of a diff."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as a file can have it."""

    text: str
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] = ()
    output_logprobs: tuple[TokenLogprob, ...] = ()

    def completion(self) -> Completion:
        """Return it as it was given."""
        ids = token_ids(self.output_ids)
        return Completion(ids, self.text, self.finish_reason, self.usage, self.logprobs, self.output_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a call asked for. `prompt` is its text without special tokens; `ids_hash` is of its exact ids."""

    call_path: str
    prompt: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    ids_hash: str
    score_from: int | None
    num_top_logprobs: int | None

    @classmethod
    def of(cls, request: Request, chat: ChatFormat) -> "Asked":
        """Return what a request asks for."""
        return cls(
            call_path=request.call_path,
            prompt=chat.decode(request.prompt),
            messages=request.messages,
            sampling=request.sampling,
            ids_hash=hashlib.blake2b(request.prompt.tobytes(), digest_size=16).hexdigest(),
            score_from=request.score_from,
            num_top_logprobs=request.num_top_logprobs,
        )

    @property
    def key(self) -> Hashable:
        """What must be equal for two calls to have the same answer."""
        return self.ids_hash, self.sampling, self.score_from, self.num_top_logprobs

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal beside the prompt."""
        ours = {"score_from": self.score_from, "num_top_logprobs": self.num_top_logprobs}
        return asdict(self.sampling) | ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(Asked):
    """One line of a file: a call and its answer."""

    answer: Answer

    def to_line(self) -> bytes:
        """Return it as JSON, of the sampling only what is not the default."""
        from pydantic_core import to_json

        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        default = asdict(SamplingParams())
        sampling = asdict(self.sampling)
        parts["sampling"] = {name: value for name, value in sampling.items() if value != default[name]}
        return to_json(parts, inf_nan_mode="strings") + b"\n"


class Recorder:
    """A backend that asks another one, and writes down what it answers; made by `record`."""

    def __init__(self, backend: Backend, file: IO[bytes]) -> None:
        self._backend = backend
        self._file = file
        self.begin_program: Callable[[PlanHint], None] = backend.begin_program
        self.pause: Callable[[ProgramId, float], None] = backend.pause
        self.give_back: Callable[[ProgramId, int], None] = backend.give_back
        self.end_program: Callable[[ProgramId], None] = backend.end_program

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the model behind the backend."""
        return self._backend.chat

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Ask the other backend. Calls that fail are not written down."""
        done = await self._backend.generate(request, on_chunk)
        asked = Asked.of(request, self.chat)
        self._file.write(_recorded(asked, done).to_line())
        self._file.flush()
        return done

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on the event loop that owns the backend."""
        return self._backend.call(fn)


class Replay:
    """A backend that answers from recordings; made by `replay`. It hears of program runs and ignores it."""

    def __init__(self, recordings: Sequence[Recording], chat: ChatFormat) -> None:
        self.chat = chat
        self._recordings = recordings
        self._answers: defaultdict[Hashable, deque[Answer]] = defaultdict(deque)
        for recording in recordings:
            self._answers[recording.key].append(recording.answer)

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer as recorded. Equal calls get their answers in the order recorded, the last one for ever.

        Raises ReplayMiss, which shows where the nearest recording differs.
        """
        await asyncio.sleep(0)
        asked = Asked.of(request, self.chat)
        answers = self._answers.get(asked.key)
        if not answers:
            raise self._miss(request, asked)
        answer = answers.popleft() if len(answers) > 1 else answers[0]
        done = answer.completion()
        if on_chunk:
            await stream_out(done, on_chunk)
        return done

    def begin_program(self, hint: PlanHint) -> None:
        """Ignore it."""

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Ignore it."""

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Ignore it."""

    def end_program(self, program_id: ProgramId) -> None:
        """Ignore it."""

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on an event loop of its own."""
        return call_on_own_loop(fn)

    def _miss(self, request: Request, asked: Asked) -> ReplayMiss:
        return ReplayMiss(
            f"call {asked.call_path} is not in the recording: {self._difference(asked)}",
            program_id=request.program_id,
            request_id=request.request_id,
            call_path=request.call_path,
        )

    def _difference(self, asked: Asked) -> str:
        """Say how the nearest recording differs."""
        same_prompt = [one for one in self._recordings if one.ids_hash == asked.ids_hash]
        if same_prompt:
            return _settings_difference(same_prompt, asked)
        near = self._nearest(asked)
        if near is None:
            return "it is empty"
        diff = _diff(near, asked)
        if not diff:
            return (
                f"the text of {near.call_path} is the same, but not its tokens; "
                "give the chat format of the model it was recorded with (chat=)"
            )
        return f"the prompt of {near.call_path}, which is nearest, differs\n{diff}"

    def _nearest(self, asked: Asked) -> Recording | None:
        """Return the recording whose prompt begins most like this one.

        It is of the same call if there is one, at best in the same row.
        """
        by_path, path = self._by_path, asked.call_path
        candidates = by_path.get(path) or by_path.get(without_row(path)) or self._sorted
        at = bisect_left(candidates, asked.prompt, key=_prompt)
        around = candidates[max(0, at - 1) : at + 1]  # sorted, so no other shares more with it
        return max(around, key=lambda one: _num_shared(one.prompt, asked.prompt), default=None)

    @cached_property
    def _sorted(self) -> list[Recording]:
        return sorted(self._recordings, key=_prompt)

    @cached_property
    def _by_path(self) -> dict[str, list[Recording]]:
        by_path = defaultdict(list)
        for recording in self._sorted:
            for path in {recording.call_path, without_row(recording.call_path)}:
                by_path[path].append(recording)
        return dict(by_path)


@contextmanager
def record(backend: Backend, path: str | Path) -> Iterator[Recorder]:
    """Return a backend that asks `backend` and writes each call that finishes to the file `path`.

    Use it in a `with` statement, and its file later with `replay`. A file that exists is made anew. Raises
    InputError when it cannot be written.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "wb"))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); give a file in a folder that exists"
            ) from error
        yield Recorder(backend, file)


def replay(path: str | Path, *, chat: ChatFormat | None = None) -> Replay:
    """Return a backend that answers from a file made by `record`, with the token counts of then.

    `chat` must be the format of the model recorded with; `ChatFormat.of_bytes()` unless given. Raises
    InputError, naming the line, when the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it with `with ps.record(backend, path)`"
        ) from error
    return Replay(_read(path, lines), chat or ChatFormat.of_bytes())


def _read(path: str | Path, lines: Iterable[bytes]) -> list[Recording]:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(Recording)
    recordings = []
    for number, line in enumerate(lines, 1):
        try:
            recordings.append(adapter.validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "line"
            raise InputError(f"{path}, line {number}: {where}: {first['msg']}; record it anew") from error
    return recordings


def _recorded(asked: Asked, done: Completion) -> Recording:
    answer = Answer(
        done.text,
        tuple(done.output_ids),
        done.finish_reason,
        done.usage,
        done.logprobs,
        done.output_logprobs,
    )
    return Recording(**{field.name: getattr(asked, field.name) for field in fields(asked)}, answer=answer)


def _prompt(asked: Asked) -> str:
    return asked.prompt


def _num_shared(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    wide = [text.encode("utf-32-le", "surrogatepass") for text in (a, b)]  # four bytes each, as tokens have
    return common_prefix_len(wide[0], wide[1])


def _settings_difference(same_prompt: Iterable[Asked], asked: Asked) -> str:
    """Say which settings differ from the recording in which the fewest do."""
    now = asked.settings
    then = min(
        (one.settings for one in same_prompt), key=lambda old: sum(old[name] != now[name] for name in now)
    )
    changes = [f"{name} was {then[name]!r} and is {now[name]!r}" for name in now if then[name] != now[name]]
    return f"its prompt is, but only the sampling differs: {', '.join(changes)}"


def _diff(near: Asked, asked: Asked) -> str:
    """Return how the messages differ, from the first that does, or else the texts; empty if neither does."""
    pairs = zip(near.messages, asked.messages, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    old = [line for message in near.messages[same:] for line in _message_lines(message)]
    new = [line for message in asked.messages[same:] for line in _message_lines(message)]
    if old == new:
        old, new = _lines(near.prompt), _lines(asked.prompt)
    diff = list(unified_diff(old, new, "recorded", "asked", lineterm=""))
    return "\n".join(diff[:DIFF_LINES])


def _message_lines(message: Message) -> list[str]:
    content = message["content"]
    return [f"{message['role']}:", *_lines(content if isinstance(content, str) else _parts_text(content))]


def _parts_text(parts: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a message's parts; images by their first characters."""
    return "\n".join(part["text"] if "text" in part else str(part)[:LINE_CHARS] for part in parts)


def _lines(text: str) -> list[str]:
    """Return the lines of a text, long ones in pieces."""
    return [
        line[i : i + LINE_CHARS] for line in text.splitlines() for i in range(0, len(line) or 1, LINE_CHARS)
    ]
