"""Questions that a traced program asks of texts that are not generated yet.

A question has a few possible answers. One reading of the program takes one answer to each question; the
explorer reads again with other answers until it has seen them all, or enough. Which reading is under way is
kept in a context variable: outside a trace there is none, and holes cannot exist.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")

_PACKAGE = str(Path(__file__).parent.parent)


class Undecided(Exception):
    """The program asks something of a generated text that only the run can answer."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One question of one reading: where it is asked, for the how-manieth time, and the answer taken.

    `num_calls`: calls made before it.
    """

    site: str
    occurrence: int
    num_calls: int
    question: str
    options: tuple[str, ...]
    taken: int


class Oracle(Protocol):
    """What answers questions in a trace."""

    def decide(self, question: str, options: Sequence[T]) -> T:
        """Return one of the options. Raises Undecided when there are too many questions."""
        ...

    def hole_for(self, text: str, max_len: int) -> str:
        """Return the marker of a new hole of at most `max_len` tokens that stands for `text`'s source."""
        ...


_oracle: ContextVar[Oracle | None] = ContextVar("oracle", default=None)


@contextmanager
def asking(oracle: Oracle) -> Iterator[None]:
    """Let `oracle` answer all questions for as long as the context lasts."""
    token = _oracle.set(oracle)
    try:
        yield
    finally:
        _oracle.reset(token)


def is_tracing() -> bool:
    """Return whether the program is being read and not run: nothing it does may have an effect."""
    return _oracle.get() is not None


def decide(question: str, options: Sequence[T]) -> T:
    """Return the answer that this reading takes. Raises Undecided when a hole has left its trace."""
    oracle = _oracle.get()
    if oracle is None:
        raise Undecided(f"{question} outside the trace that it belongs to")
    return options[0] if len(options) == 1 else oracle.decide(question, options)


def new_hole(what: str, max_len: int) -> str:
    """Return the marker of a new hole, for a text that does not come from a call: a tool's result."""
    oracle = _oracle.get()
    assert oracle is not None, "holes are made in traces only"
    return oracle.hole_for(what, max_len)


def caller() -> str:
    """Return `file:line` of the innermost frame outside this package: where the user wrote it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
