"""One reading of a program: real arguments, symbolic generations, given answers to what depends on them.

The body runs natively against an interpreter that answers every call at once with a hole. A hole's
tokens are negative ids, the same ones wherever the generation reappears: so two calls that extend the
same generation share it in the plan, whatever it will say. They are as many as the generation is expected
to have; how few and how many it can have is kept beside.
"""

import dis
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from preble_sgl.core import Completion, ProgramId, Request, TokenIds, Usage, token_ids
from preble_sgl.dsl.calls import CallSite
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.conversation import Conversation, Encode, Segment
from preble_sgl.dsl.decisions import Decision, Undecided, asking, caller
from preble_sgl.dsl.holes import ChoiceHole, Hole, has_marker, marker, split_markers
from preble_sgl.dsl.ops import Gen, Selection
from preble_sgl.dsl.state import State
from preble_sgl.dsl.tools import Tool, ToolCall, Turn
from preble_sgl.dsl.typed_holes import typed_hole
from preble_sgl.errors import InputError

T = TypeVar("T")

MAX_HOLE_LEN = 1 << 15
_MAX_HOLES = 1 << 16

MOST_DECISIONS = 48
"""A reading ends when it has asked so many questions: what it reads is a loop without a limit."""


@dataclass(frozen=True, slots=True)
class HoleLen:
    """How many tokens a hole can have, and is expected to have."""

    lower: int
    expected: int
    upper: int


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call that a run will make. Negative ids in the prompt stand for tokens not generated yet.

    `depth`: calls that must end before it can begin, one after the other. `after`: those right before it, by
    their place in the reading. `output_len`: tokens that it generates.
    """

    request: Request
    segments: tuple[Segment, ...]
    output: TokenIds
    depth: int = 0
    line: str = ""
    after: tuple[int, ...] = ()
    output_len: HoleLen = HoleLen(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reading found, in program order.

    `holes`: the lengths of all holes by number. `stopped_at`: where reading ended early, and why. `is_open`:
    it ended early, so that the run may make more calls than are listed.
    """

    calls: tuple[TracedCall, ...]
    decisions: tuple[Decision, ...]
    holes: tuple[HoleLen, ...]
    stopped_at: str | None = None
    is_open: bool = False


OutputLen = Callable[[str], float | None]
"""How many tokens the calls on a line generate on average, as far as earlier runs have shown."""


class Tracer:
    """Answers every call of one program run with a hole and writes the call down.

    `script`: which answers to take to the first questions; the first answer after that. `noise`: what stands
    around the markers, to find out whether the program looks at texts in a way that cannot be seen here.
    """

    def __init__(
        self,
        chat: ChatFormat,
        program_id: ProgramId,
        script: Sequence[int],
        *,
        output_len: OutputLen = lambda line: None,
        noise: str = "",
    ) -> None:
        self._chat = chat
        self._script = script
        self._output_len = output_len
        self._noise = noise
        self._seen: dict[str, int] = {}
        self.program_id = program_id
        self.calls: list[TracedCall] = []
        self.decisions: list[Decision] = []
        self.holes: list[HoleLen] = []

    @property
    def encode(self) -> Encode:
        """Tokenise the constant stretches of a text and put each hole's ids in its place."""
        return self._encode

    def _encode(self, text: str) -> TokenIds:
        text = str.__str__(text)  # a choice would be made if it were asked
        if not has_marker(text):
            return self._chat.encode(text)
        ids = token_ids()
        for piece in split_markers(text):
            ids.extend(self._chat.encode(piece) if isinstance(piece, str) else self._hole_ids(piece))
        return ids

    async def answer(
        self, request: Request, site: CallSite, op: Gen[Any] | None, conversation: Conversation
    ) -> tuple[int, Completion, Any]:
        """Invent an answer."""
        length = self._length_of(request, op, site.line)
        number = self._new_hole(length)
        output = self._hole_ids(number)
        self.calls.append(
            TracedCall(request, conversation.segments, output, site.depth, site.line, site.after, length)
        )
        logprobs = (0.0,) * (len(request.prompt) - request.score_from) if request.score_from else ()
        text = self._text(number)
        completion = Completion(output, text, "length", Usage(), logprobs)
        return len(self.calls) - 1, completion, self._value(op, text)

    def _length_of(self, request: Request, op: Gen[Any] | None, line: str) -> HoleLen:
        most = request.sampling.max_new_tokens
        if most > MAX_HOLE_LEN:
            raise InputError(f"a plan takes generations of at most {MAX_HOLE_LEN} tokens, not {most}")
        if op is not None and op.choices:
            lengths = [len(self._chat.encode(choice)) for choice in op.choices]
            return HoleLen(min(lengths), max(lengths), max(lengths))
        least = most if request.sampling.ignore_eos else 0
        seen = request.expected_output_len or self._output_len(line)
        return HoleLen(least, most if seen is None else min(most, max(least, round(seen))), most)

    def _value(self, op: Gen[Any] | None, text: str) -> Any:
        if op is None:
            return None
        if op.choices:
            return ChoiceHole.of(text, op.choices)
        return typed_hole(text, op.type_, op.schema)

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Return a choice that is made when somebody looks at it, as long as the longest candidate."""
        lengths = [len(self._chat.encode(choice)) for choice in choices]
        number = self._new_hole(HoleLen(min(lengths), max(lengths), max(lengths)))
        return Selection(ChoiceHole.of(self._text(number), choices), choices, scores)

    def turn(self, value: Any, tools: Sequence[Tool[..., Any]], final: Any) -> Turn[Any]:
        """Return a turn of the kind that this reading takes; which tool is called is left open."""
        if value.has_field("final"):
            return Turn((), typed_hole(str(value), final))
        calls = tuple(_OpenCall(str(value), tools) for _ in range(len(value["calls"])))
        return Turn(calls, None)  # type: ignore[arg-type]

    async def use(self, calls: Sequence[ToolCall], max_parallel: int, path: str) -> list[str]:
        """Return a hole per call, as long as the longest result of any tool can be."""
        return [Hole(self.hole_for("tool", call.max_len)) for call in calls]  # type: ignore[attr-defined]

    async def gather(self, awaitables: Sequence[Awaitable[T]]) -> list[T]:
        """Await one after the other: answers come at once, and so the order is always the same."""
        try:
            return [await awaitable for awaitable in awaitables]
        finally:
            for awaitable in awaitables:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()

    def branches_done(self, num_tokens: int) -> None:
        """Do nothing: a plan counts what a run holds at its widest."""

    def pause(self, expected_s: float) -> None:
        """Do nothing: no time passes."""

    def decide(self, question: str, options: Sequence[T]) -> T:
        """Take the answer that the script has for this question, or the first."""
        place = len(self.decisions)
        if place == MOST_DECISIONS:
            raise Undecided(
                f"asks more than {MOST_DECISIONS} questions of generated texts: use s.loop(max=...)"
            )
        taken = self._script[place] if place < len(self._script) else 0
        if taken >= len(options):
            raise Undecided(f"asks something else when it is read again: {question}")
        site = caller()
        occurrence = self._seen.get(site, 0)
        self._seen[site] = occurrence + 1
        names = tuple(str(option)[:80] for option in options)
        self.decisions.append(Decision(site, occurrence, len(self.calls), question, names, taken))
        return options[taken]

    def hole_for(self, text: str, max_len: int) -> str:
        """Return the text of a new hole of at most `max_len` tokens."""
        seen = self._output_len(text)
        expected = max_len if seen is None else min(max_len, round(seen))
        return self._text(self._new_hole(HoleLen(0, expected, max_len)))

    def _text(self, number: int) -> str:
        return f"{self._noise}{marker(number)}{self._noise}"

    def _new_hole(self, length: HoleLen) -> int:
        if len(self.holes) == _MAX_HOLES:
            raise InputError(f"a plan takes at most {_MAX_HOLES} generations per run")
        self.holes.append(length)
        return len(self.holes) - 1

    def _hole_ids(self, number: int) -> TokenIds:
        first = -1 - number * MAX_HOLE_LEN
        return token_ids(range(first, first - self.holes[number].expected, -1))


class _OpenCall:
    """A call of a tool in a trace: which tool is decided when somebody looks."""

    def __init__(self, text: str, tools: Sequence[Tool[..., Any]]) -> None:
        self._text = text
        self._tools = tools
        self._taken: Tool[..., Any] | None = None
        self.max_len = max(tool.max_len for tool in tools)

    @property
    def tool(self) -> Tool[..., Any]:
        from preble_sgl.dsl.decisions import decide

        if self._taken is None:
            by_name = {tool.name: tool for tool in self._tools}
            self._taken = by_name[decide("which tool", tuple(by_name))]
        return self._taken

    @property
    def arguments(self) -> Any:
        import orjson

        return typed_hole(self._text, None, orjson.dumps(self.tool.schema).decode())


async def read(
    body: Callable[..., Awaitable[Any]],
    name: str,
    arguments: Mapping[str, Any],
    tracer: Tracer,
    *,
    result_type: Any = str,
) -> Reading:
    """Read one row's run once. An error of the body ends the reading, as it will end the run."""
    state = State(tracer, Conversation(tracer._chat, tracer.encode), name, result_type=result_type)
    stopped_at, is_open = None, False
    try:
        with asking(tracer):
            await body(state, **arguments)
    except Undecided as undecided:
        stopped_at, is_open = f"{_line_of(undecided, body)}: {undecided}", True
    except Exception as error:
        stopped_at = f"{_line_of(error, body)}: {type(error).__name__}: {error}"
        is_open = bool(tracer.holes) and not _is_raised_in(error, body)
    return Reading(tuple(tracer.calls), tuple(tracer.decisions), tuple(tracer.holes), stopped_at, is_open)


def _is_raised_in(error: BaseException, body: Callable[..., Any]) -> bool:
    """Return whether a `raise` of the program's own file raised it: else it may be a hole's doing."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_frame.f_code.co_filename != inspect.getfile(body):
        return False
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _line_of(error: BaseException, body: Callable[..., Any]) -> str:
    """Return the line of the program's own file on which `error` came up."""
    file = inspect.getfile(body)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}:{lines[-1] if lines else '?'}"
