"""Symbolic generations: what a traced program gets instead of a model's answer.

A hole is a string whose text is a marker in Unicode's private-use area. It survives concatenation,
f-strings, `join` and the chat template, so a prompt built from it can be cut at the marker afterwards.
What is asked of a hole with few possible answers (a comparison, a search) is a decision, and the explorer
reads on with each answer. What has many (a length, a number, the words) raises `Undecided`: there the
program cannot be read on; `ps.parse` has functions that ask the same with few answers.

Strings that Python itself builds from holes (f-strings, `join`) are ordinary strings with markers in them:
what is asked of those is not seen here, but found by reading the program again with other texts around the
markers (`explore.py`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, SupportsIndex

from preble_sgl.dsl.decisions import Undecided, decide

_OPEN, _CLOSE, _ZERO = "\ue000", "\ue001", 0xE010
_MARKER = re.compile(f"{_OPEN}([\ue010-\ue019]+){_CLOSE}")


def _words(text: str) -> list[str]:
    return text.split()


_STAYS_A_HOLE = _words("""
    strip lstrip rstrip lower upper title capitalize removesuffix removeprefix casefold replace
    expandtabs swapcase zfill ljust rjust center translate format format_map
    __getitem__ __mod__ __mul__ __rmul__
""")
_YES_OR_NO = _words("""
    __contains__ __bool__ __lt__ __le__ __gt__ __ge__ startswith endswith
    isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace
    istitle isupper
""")
_MANY_ANSWERS = _words("""
    __iter__ __len__ __int__ __float__ __index__ __hash__ count encode find index rfind rindex
""")
_LISTS = _words("split rsplit splitlines")
_TRIPLES = _words("partition rpartition")

YES_NO = (False, True)


def marker(number: int) -> str:
    """Return the text that stands for generation `number`."""
    digits = "".join(chr(_ZERO + int(digit)) for digit in str(number))
    return f"{_OPEN}{digits}{_CLOSE}"


def has_marker(text: str) -> bool:
    """Return whether a text is, or contains, a hole."""
    return _OPEN in str.__str__(text)


def split_markers(text: str) -> list[str | int]:
    """Cut `text` at its markers: constant strings, and the numbers of the generations between them."""
    pieces: list[str | int] = list(_MARKER.split(text))
    for i in range(1, len(pieces), 2):
        pieces[i] = int("".join(str(ord(digit) - _ZERO) for digit in str(pieces[i])))
    return [piece for piece in pieces if piece != ""]


class Hole(str):
    """A generated text that is not known yet."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and str.__eq__(self, other):
            return True  # the same generation
        return decide("== of a generated text", YES_NO)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: Any) -> Any:
        return Hole(str.__str__(self) + str.__str__(other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Hole":
        return Hole(str.__str__(other) + str.__str__(self))

    def join(self, texts: Any) -> "Hole":
        """Return the joined text."""
        return Hole(str.__str__(self).join(texts))


class HoleList(list[Any]):
    """The parts of a generated text: each is a hole; how many there are is not known, but for a limit."""

    def __init__(self, text: str, limit: int | None = None) -> None:
        super().__init__()
        self._text = text
        self._limit = limit

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if not isinstance(key, slice):
            return Hole(self._text)
        return HoleList(self._text, key.stop if isinstance(key.stop, int) and key.stop >= 0 else self._limit)

    def __iter__(self) -> Iterator[Any]:
        return iter([Hole(self._text)] * self._count())

    def __len__(self) -> int:
        return self._count()

    def __bool__(self) -> bool:
        return decide("the parts of a generated text", YES_NO)

    def __contains__(self, item: object) -> bool:
        return decide("in of the parts of a generated text", YES_NO)

    def _count(self) -> int:
        if self._limit is None:
            raise Undecided("depends on the number of parts of a generated text: use ps.parse.lines(text, n)")
        return decide("the number of parts of a generated text", range(self._limit, -1, -1))


class ChoiceHole(Hole):
    """A text that will be one of a few. Whoever asks for more than to write it down learns which."""

    _options: tuple[str, ...]
    _known: str | None = None

    @classmethod
    def of(cls, text: str, options: Sequence[str]) -> "ChoiceHole":
        """Return a hole that stands for one of `options`."""
        hole = cls(text)
        hole._options = tuple(options)
        return hole

    def resolved(self) -> str:
        """Return the option that this reading takes."""
        if self._known is None:
            self._known = decide("which choice", self._options)
        return self._known

    def __eq__(self, other: object) -> bool:
        return self.resolved() == other

    def __str__(self) -> str:
        return self._known if self._known is not None else str.__str__(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    __hash__: Any


def _refuse(name: str) -> Any:
    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise Undecided(f"depends on the {name.strip('_')} of a generated text")

    return method


def _ask(name: str) -> Any:
    def method(self: Any, *_: Any, **__: Any) -> bool:
        return decide(f"{name.strip('_')} of a generated text", YES_NO)

    return method


def _resolve(name: str) -> Any:
    def method(self: ChoiceHole, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.resolved(), name)(*args, **kwargs)

    return method


def _keep(self: Hole, *_: Any, **__: Any) -> Hole:
    return Hole(self)


def _list(self: Hole, *_: Any, **__: Any) -> HoleList:
    return HoleList(str.__str__(self))


def _triple(self: Hole, *_: Any) -> tuple[Hole, Hole, Hole]:
    return Hole(self), Hole(self), Hole(self)


def _equip() -> None:
    """Give the classes their methods: one rule per group of names."""
    for name in _STAYS_A_HOLE:
        setattr(Hole, name, _keep)
    for name in _YES_OR_NO:
        setattr(Hole, name, _ask(name))
    for name in _MANY_ANSWERS:
        setattr(Hole, name, _refuse(name))
    for name in _LISTS:
        setattr(Hole, name, _list)
    for name in _TRIPLES:
        setattr(Hole, name, _triple)
    for name in (*_STAYS_A_HOLE, *_YES_OR_NO, *_MANY_ANSWERS, *_LISTS, *_TRIPLES):
        if hasattr(str, name):
            setattr(ChoiceHole, name, _resolve(name))
    ChoiceHole.__bool__ = lambda self: bool(self.resolved())  # type: ignore[attr-defined]
    ChoiceHole.__int__ = lambda self: int(self.resolved())  # type: ignore[attr-defined]
    ChoiceHole.__float__ = lambda self: float(self.resolved())  # type: ignore[attr-defined]


_equip()
