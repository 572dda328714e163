"""Reading a program with every answer to what depends on generated texts, or with enough of them.

A reading takes the first answer to every question beyond its script. From it come the scripts of further
readings: the same answers up to some question, and there another one. Scripts are read in the order of how
often they depart from first answers, so that what is left out when there are too many is the far-fetched.

Two readings more per template check the tracer itself: one sees other texts around the markers, and must make
the same calls, else the program looks at generated texts in a way that only the run can answer; one sees the
same, and must send the same prompts, else something (the clock, chance) is different each time.
"""

import inspect
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import CodeType
from typing import Any

from preble_sgl.core import ProgramId
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.tracer import Reading, TracedCall, Tracer, read

MOST_READINGS = 64
"""Readings of one row, at most."""

MOST_BATCH_READINGS = 20_000
"""Readings of all rows together; later rows are read once and taken to be like others of their template."""

MOST_NOISES = 8
MOST_WORD_CHARS = 40
MOST_DEPTH = 2
"""Texts to look for are taken from the program and from what it refers to, not from further on."""

_NOISE_WORDS = ' yes no true 0 1 7 A b [x] (y) {"k": 1} '

Script = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """All readings of one row, and how likely each is (adds up to 1).

    `is_complete`: there are no others. `like`: the row whose readings stand for this one's, if it was read
    only once for want of time.
    """

    row: int
    readings: tuple[Reading, ...]
    weights: tuple[float, ...] = (1.0,)
    is_complete: bool = True
    like: int | None = None

    @property
    def likeliest(self) -> Reading:
        """The reading that the run is most likely to follow."""
        return self.readings[max(range(len(self.readings)), key=lambda i: self.weights[i])]

    @property
    def calls(self) -> tuple[TracedCall, ...]:
        """The calls of the likeliest reading, in program order."""
        return self.likeliest.calls

    @property
    def stopped_at(self) -> str | None:
        """Where a reading ended early, and why; None if all came to the end."""
        return next((reading.stopped_at for reading in self.readings if reading.stopped_at), None)

    @property
    def is_open(self) -> bool:
        """Whether the run may make calls that no reading has."""
        return not self.is_complete or any(reading.is_open for reading in self.readings)

    @property
    def certain(self) -> tuple[TracedCall, ...]:
        """The calls that are made whatever is generated: those before the first decision."""
        first = self.readings[0]
        return first.calls[: first.decisions[0].num_calls] if first.decisions else first.calls


@dataclass(frozen=True, slots=True)
class Body:
    """What is to be read: a program's function and name."""

    fn: Callable[..., Awaitable[Any]]
    name: str
    result_type: Any


class Explorer:
    """Reads rows of one program; remembers the templates that it has met."""

    def __init__(self, body: Body, chat: ChatFormat, profile: ProgramProfile | None) -> None:
        self._body = body
        self._chat = chat
        self._profile = profile
        self._templates: dict[tuple[str, ...], int] = {}
        self._num_readings = 0
        self.warnings: dict[str, None] = {}

    async def trace(self, row: int, arguments: Mapping[str, Any]) -> Trace:
        """Read a row. O(readings x calls)."""
        first = await self._read(row, arguments, ())
        template = _template(first)
        if template not in self._templates:
            self._templates[template] = row
            await self._check(row, arguments, first)
        if not first.decisions:
            return Trace(row, (first,))
        if self._num_readings >= MOST_BATCH_READINGS:
            return Trace(row, (first,), like=self._templates[template])
        readings, is_complete = await self._all(row, arguments, first)
        return Trace(row, readings, self._weights(readings), is_complete)

    async def _all(
        self, row: int, arguments: Mapping[str, Any], first: Reading
    ) -> tuple[tuple[Reading, ...], bool]:
        """Return all readings, or the first MOST_READINGS, and whether it is all."""
        known: dict[tuple[str, bytes], TracedCall] = {}
        readings = [_shared(first, known)]
        todo = deque(_departures(first, 0))
        while todo and len(readings) < MOST_READINGS:
            script = todo.popleft()
            reading = await self._read(row, arguments, script)
            readings.append(_shared(reading, known))
            todo.extend(_departures(reading, len(script)))
        return tuple(readings), not todo

    async def _read(self, row: int, arguments: Mapping[str, Any], script: Script, noise: str = "") -> Reading:
        self._num_readings += 1
        path = f"{self._body.name}[{row}]"
        tracer = Tracer(self._chat, ProgramId(path), script, output_len=self._output_len, noise=noise)
        return await read(self._body.fn, path, arguments, tracer, result_type=self._body.result_type)

    def _output_len(self, line: str) -> float | None:
        return self._profile.output_len(self._body.name, line) if self._profile else None

    def _weights(self, readings: Sequence[Reading]) -> tuple[float, ...]:
        """Return how likely each reading is: the product of its answers' weights, scaled to add up to 1."""
        name, profile = self._body.name, self._profile or ProgramProfile()
        raw = [
            prod(profile.weights(name, d.site, d.occurrence, d.options)[d.taken] for d in r.decisions)
            for r in readings
        ]
        return tuple(weight / sum(raw) for weight in raw)

    async def _check(self, row: int, arguments: Mapping[str, Any], first: Reading) -> None:
        """Read twice more, and warn of what should not differ."""
        script = tuple(decision.taken for decision in first.decisions)
        again = await self._read(row, arguments, script)
        if line := _first_difference(first, again):
            self._warn(f"{line}: the prompt is different each time (the clock, chance, or an effect)")
            return
        for noise in _noises(self._body.fn) if first.holes else ():
            noisy = await self._read(row, arguments, script, noise)
            if line := _first_other_call(first, noisy):
                self._warn(
                    f"{line}: what happens here depends on a generated text in a way that cannot be read "
                    "before the run: compare the text itself, or use ps.parse"
                )
                return

    def _warn(self, text: str) -> None:
        self.warnings.setdefault(text)


def _departures(reading: Reading, num_scripted: int) -> list[Script]:
    """Return the scripts that give another answer to one question after the first `num_scripted`."""
    taken = tuple(decision.taken for decision in reading.decisions)
    return [
        (*taken[:place], other)
        for place in range(num_scripted, len(taken))
        for other in range(1, len(reading.decisions[place].options))
    ]


def _shared(reading: Reading, known: dict[tuple[str, bytes], TracedCall]) -> Reading:
    """Use one object for a call that several readings make."""
    calls = tuple(
        known.setdefault((call.request.call_path, call.request.prompt.tobytes()), call)
        for call in reading.calls
    )
    return replace(reading, calls=calls)


def _template(reading: Reading) -> tuple[str, ...]:
    """Return what rows of one template have in common: the lines of their calls and questions."""
    lines = [segment.label for call in reading.calls for segment in call.segments[-2:]]
    return (*lines, *(decision.site for decision in reading.decisions))


def _first_difference(a: Reading, b: Reading) -> str | None:
    """Return the line of the first text that one reading has and the other has not."""
    for one, other in zip(a.calls, b.calls, strict=False):
        start = 0
        for mine, theirs in zip(one.segments, other.segments, strict=False):
            if (
                mine != theirs
                or one.request.prompt[start : mine.end] != other.request.prompt[start : mine.end]
            ):
                return mine.label.split()[-1]
            start = mine.end
    return _first_other_call(a, b)


def _first_other_call(a: Reading, b: Reading) -> str | None:
    """Return the line of the first call that two readings do not share, or where the shorter one ends."""
    for one, other in zip(a.calls, b.calls, strict=False):
        if one.line != other.line:
            return one.line
    if len(a.calls) != len(b.calls):
        longer = max(a.calls, b.calls, key=len)
        return longer[min(len(a.calls), len(b.calls))].line
    if a.stopped_at != b.stopped_at:
        return (a.stopped_at or b.stopped_at or "").split(": ")[0]
    return None


def _noises(fn: Callable[..., Any]) -> list[str]:
    """Return texts that hold whatever short text the function might look for, each time another one first."""
    words = [word for word in dict.fromkeys(_words_of(fn, MOST_DEPTH)) if 0 < len(word) < MOST_WORD_CHARS]
    rest = f"\n{_NOISE_WORDS}\n" + "\n".join(words) + "\n"
    return [rest, *(word + rest for word in words[:MOST_NOISES])]


def _words_of(fn: Any, depth: int) -> Iterator[str]:
    """Yield the texts that a function, and the functions and patterns that it refers to, have in them."""
    if isinstance(fn, str):
        yield fn
    elif isinstance(fn, re.Pattern):
        yield str(fn.pattern)
    elif depth and inspect.isfunction(fn):
        yield from _constants(fn.__code__)
        names = inspect.getclosurevars(fn)
        for used in (*names.nonlocals.values(), *names.globals.values()):
            yield from _words_of(used, depth - 1)


def _constants(code: CodeType) -> Iterator[str]:
    """Yield the texts among the constants of a function and of those in it, its docstring left out."""
    for constant in code.co_consts[1:]:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _constants(constant)
