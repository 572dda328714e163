"""Reading a program before it runs: real arguments, symbolic generations.

The body runs natively against an interpreter that answers every call at once with a hole. A hole's
tokens are negative ids, the same ones wherever the generation reappears: so two calls that extend the
same generation share it in the plan, whatever it will say. Its length is the call's token limit.
A program that decides something by a generated text is read up to that point, one that raises up to the
error; the trace says where.
"""

import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preble_sgl.core import Completion, ProgramId, Request, TokenIds, Usage, token_ids
from preble_sgl.dsl.chat import ChatFormat, Conversation, Segment
from preble_sgl.dsl.holes import Hole, TypedHole, Undecided, marker, split_markers
from preble_sgl.dsl.ops import Selection
from preble_sgl.dsl.state import State
from preble_sgl.errors import InputError

_MAX_HOLE_LEN = 1 << 15
_MAX_HOLES = 1 << 16


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call that a run will make. Negative ids in the prompt stand for tokens not generated yet.

    `depth`: calls that must end before it can begin, one after the other.
    """

    request: Request
    segments: tuple[Segment, ...]
    output: TokenIds
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """The calls of one row, in program order; `stopped_at` says where reading ended early, and why."""

    row: int
    calls: tuple[TracedCall, ...]
    stopped_at: str | None = None


class Tracer:
    """Answers every call of one program run with a hole and writes the call down."""

    def __init__(self, chat: ChatFormat, program_id: ProgramId) -> None:
        self._chat = chat
        self._lengths: list[int] = []
        self.program_id = program_id
        self.calls: list[TracedCall] = []

    def encode(self, text: str) -> TokenIds:
        """Tokenise the constant stretches of `text` and put each hole's ids in its place."""
        ids = token_ids()
        for piece in split_markers(text):
            ids.extend(self._chat.encode(piece) if isinstance(piece, str) else self._hole_ids(piece))
        return ids

    async def complete(self, request: Request, state: State) -> Completion:
        """Invent an answer of the greatest length allowed."""
        number, output = self._new_hole(request.sampling.max_new_tokens)
        self.calls.append(TracedCall(request, state.conversation.segments, output, state.depth))
        logprobs = (0.0,) * (len(request.prompt) - request.score_from) if request.score_from else ()
        return Completion(output, marker(number), "length", Usage(), logprobs)

    def branches_done(self, num_tokens: int) -> None:
        """Do nothing: a plan counts what a run holds at its widest."""

    def value(self, type_: Any, completion: Completion) -> Any:
        """Return a hole of the declared type."""
        hole = Hole(completion.text)
        return hole if type_ is str else TypedHole(hole)

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Return a choice that nothing may depend on yet, as long as the longest candidate."""
        number, _ = self._new_hole(max(len(self._chat.encode(choice)) for choice in choices))
        return Selection(Hole(marker(number)), choices, scores)

    def _new_hole(self, length: int) -> tuple[int, TokenIds]:
        if length > _MAX_HOLE_LEN or len(self._lengths) == _MAX_HOLES:
            raise InputError(f"a trace holds at most {_MAX_HOLES} generations of {_MAX_HOLE_LEN} tokens")
        self._lengths.append(length)
        return len(self._lengths) - 1, self._hole_ids(len(self._lengths) - 1)

    def _hole_ids(self, number: int) -> TokenIds:
        first = -1 - number * _MAX_HOLE_LEN
        return token_ids(range(first, first - self._lengths[number], -1))


async def trace(
    body: Callable[..., Awaitable[Any]], chat: ChatFormat, row: int, name: str, arguments: Mapping[str, Any]
) -> Trace:
    """Read one row's run. An error of the body ends the trace, as it will end the run."""
    tracer = Tracer(chat, ProgramId(f"{name}[{row}]"))
    state = State(tracer, Conversation(chat, tracer.encode), f"{name}[{row}]")
    try:
        await body(state, **arguments)
    except Undecided as undecided:
        return Trace(row, tuple(tracer.calls), f"{_line_of(undecided, body)}: {undecided}")
    except Exception as error:
        return Trace(row, tuple(tracer.calls), f"{_line_of(error, body)}: {type(error).__name__}: {error}")
    return Trace(row, tuple(tracer.calls))


def _line_of(error: BaseException, body: Callable[..., Any]) -> str:
    """Return the line of the program's own file on which `error` came up."""
    file = inspect.getfile(body)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}:{lines[-1] if lines else '?'}"
