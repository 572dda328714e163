"""Reading generated texts, in a way that can also be read before the run.

Use these instead of `re`, `int` or `split` on what a model said: in a run they do the plain thing; in a plan
each is a question with few answers, so that the program can be read on with every one of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from preble_sgl.dsl.decisions import decide
from preble_sgl.dsl.holes import YES_NO, ChoiceHole, Hole, has_marker
from preble_sgl.dsl.typed_holes import NumberHole, Written

T = TypeVar("T")

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"\w+")
_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def number(text: str, *, default: float = 0.0) -> float:
    """Return the first number in `text`, `default` if there is none."""
    if has_marker(text):
        return NumberHole(str.__str__(text), {})  # type: ignore[return-value]
    found = _NUMBER.search(text)
    return float(found[0]) if found else default


def integer(text: str, *, low: int, high: int, default: int | None = None) -> int:
    """Return the first number in `text`, rounded and moved into `low` to `high`; `default` (low) if none."""
    if has_marker(text):
        bounds = {"type": "integer", "minimum": low, "maximum": high}
        return NumberHole(str.__str__(text), bounds)  # type: ignore[return-value]
    found = _NUMBER.search(text)
    return min(high, max(low, round(float(found[0])))) if found else low if default is None else default


def yes_no(text: str, *, default: bool = False) -> bool:
    """Return whether `text` says yes or true; the first of yes, true, no and false decides."""
    if has_marker(text):
        return decide("yes or no", YES_NO)
    for word in _WORD.findall(text.lower()):
        if word in ("yes", "true", "no", "false"):
            return word in ("yes", "true")
    return default


def choice(text: str, options: Sequence[str], *, default: str | None = None) -> str:
    """Return the option that comes first in `text`, whatever its case; `default` (the last) if none does."""
    if has_marker(text):
        return ChoiceHole.of(str.__str__(text), options)
    places = [text.lower().find(option.lower()) for option in options]
    found = [
        (place, -len(option), option) for place, option in zip(places, options, strict=True) if place >= 0
    ]
    return min(found)[2] if found else options[-1] if default is None else default


def match(pattern: str, text: str) -> str | None:
    """Return what `pattern` finds in `text`: its first group, all of it without groups, or None."""
    if has_marker(text):
        return decide(f"a match of {pattern}", (Hole(text), None))
    found = re.search(pattern, text, re.DOTALL)
    return None if found is None else found[1] if found.re.groups else found[0]


def lines(text: str, limit: int) -> list[str]:
    """Return the first `limit` lines of `text` that are not blank, stripped."""
    if has_marker(text):
        return [Hole(text)] * decide("how many lines", range(limit, -1, -1))
    return [line.strip() for line in text.splitlines() if line.strip()][:limit]


def code(text: str) -> str:
    """Return what stands in the first fenced block of `text`, or all of it without one."""
    if has_marker(text):
        return Hole(text)
    found = _FENCE.search(text)
    return found[1] if found else text


def outcome(fn: Callable[[str], T], text: str, options: Sequence[T]) -> T:
    """Return `fn(text)`, one of `options`, for whatever else has to be found out about a generated text.

    While a plan is made `fn` is not called; each option is read on with.
    """
    return decide("which outcome", options) if has_marker(text) else fn(text)


def majority(values: Sequence[T]) -> tuple[T, int]:
    """Return the value that occurs most often, the earliest of several, and how often it occurs."""
    if any(isinstance(value, Written | Hole) for value in values):
        bounds = {"type": "integer", "minimum": 1, "maximum": len(values)}
        return values[0], NumberHole(str(values[0]), bounds)  # type: ignore[return-value]
    return Counter(values).most_common(1)[0]


def argmax(values: Sequence[float]) -> int:
    """Return the place of the greatest value; the earlier one wins a tie."""
    if any(isinstance(value, Written) for value in values):
        return decide("which is greatest", range(len(values)))
    return max(range(len(values)), key=lambda i: values[i])
