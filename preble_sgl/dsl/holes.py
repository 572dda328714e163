"""Symbolic generations: what a traced program gets instead of a model's answer.

A hole is a string whose text is a marker in Unicode's private-use area. It survives concatenation,
f-strings, `join` and the chat template, so a prompt built from it can be cut at the marker afterwards.
Anything that would need to know the text (a comparison, a length, a search) raises `Undecided`: from
there on the program cannot be read before it runs.
"""

import re
from typing import Any, NoReturn

_OPEN, _CLOSE, _ZERO = "\ue000", "\ue001", 0xE010
_MARKER = re.compile(f"{_OPEN}([\ue010-\ue019]+){_CLOSE}")


def _words(text: str) -> list[str]:
    return text.split()


_KEEPS_LENGTH = _words("strip lstrip rstrip lower upper title capitalize removesuffix removeprefix")
_DECIDES = _words("""
    __contains__ __getitem__ __iter__ __len__ __bool__ __int__ __float__ __index__
    __lt__ __le__ __gt__ __ge__ __mod__ __mul__ __rmul__
    casefold center count encode endswith expandtabs find format format_map index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper ljust partition
    replace rfind rindex rjust rpartition rsplit split splitlines startswith swapcase translate zfill
""")


class Undecided(Exception):
    """The program asks something of a generated text that only the run can answer."""


def marker(number: int) -> str:
    """Return the text that stands for generation `number`."""
    digits = "".join(chr(_ZERO + int(digit)) for digit in str(number))
    return f"{_OPEN}{digits}{_CLOSE}"


def split_markers(text: str) -> list[str | int]:
    """Cut `text` at its markers: constant strings, and the numbers of the generations between them."""
    pieces: list[str | int] = list(_MARKER.split(text))
    for i in range(1, len(pieces), 2):
        pieces[i] = int("".join(str(ord(digit) - _ZERO) for digit in str(pieces[i])))
    return [piece for piece in pieces if piece != ""]


def _refuse(name: str) -> Any:
    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise Undecided(f"depends on the {name.strip('_')} of a generated text")

    return method


def _keep(self: "Hole", *_: Any) -> "Hole":
    return self


class Hole(str):
    """A generated text that is not known yet."""

    __slots__ = ()

    __eq__ = __ne__ = _refuse("comparison")
    __hash__ = str.__hash__


for _name in _DECIDES:
    setattr(Hole, _name, _refuse(_name))
for _name in _KEEPS_LENGTH:
    setattr(Hole, _name, _keep)


class TypedHole:
    """A generated value of a declared type; its attributes and items are holes, too."""

    __slots__ = ("_hole",)

    def __init__(self, hole: Hole) -> None:
        self._hole = hole

    def __getattr__(self, name: str) -> "TypedHole":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "TypedHole":
        return self

    def __str__(self) -> str:
        return str.__str__(self._hole)

    def __format__(self, spec: str) -> str:
        return str(self)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse("comparison")
    __bool__ = __len__ = __iter__ = __int__ = __float__ = __index__ = _refuse("value")
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse("arithmetic")
    __hash__ = object.__hash__
