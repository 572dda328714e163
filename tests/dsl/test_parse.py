"""Reading generated texts in a run: plain functions."""

from collections.abc import Callable
from typing import Any

import pytest

from preble_sgl import parse


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda: parse.number("about -3.5 or 7"), -3.5),
        (lambda: parse.number("none", default=9.0), 9.0),
        (lambda: parse.integer("7.6 of 10", low=1, high=10), 8),
        (lambda: parse.integer("99", low=1, high=10), 10),
        (lambda: parse.integer("?", low=1, high=10), 1),
        (lambda: parse.integer("?", low=1, high=10, default=5), 5),
        (lambda: parse.yes_no("Well, yes."), True),
        (lambda: parse.yes_no("No! (yes?)"), False),
        (lambda: parse.yes_no("maybe", default=True), True),
        (lambda: parse.choice("I say RED, not blue", ["blue", "red"]), "red"),
        (lambda: parse.choice("green", ["blue", "red"]), "red"),
        (lambda: parse.choice("reddish-brown", ["red", "reddish"]), "reddish"),
        (lambda: parse.choice("green", ["blue", "red"], default="blue"), "blue"),
        (lambda: parse.match(r"Answer: (\w+)", "so\nAnswer: 42."), "42"),
        (lambda: parse.match(r"\d+", "a 7 b"), "7"),
        (lambda: parse.match("x", "y"), None),
        (lambda: parse.lines(" a \n\n b\nc", 2), ["a", "b"]),
        (lambda: parse.code("see\n```python\nx = 1\n```\nok"), "x = 1\n"),
        (lambda: parse.code("x = 1"), "x = 1"),
        (lambda: parse.argmax([1, 3, 3]), 1),
        (lambda: parse.majority(["a", "b", "b", "a"]), ("a", 2)),
        (lambda: parse.outcome(str.isupper, "ABC", (False, True)), True),
    ],
)
def test_what_is_read_from_a_text(call: Callable[[], Any], result: object) -> None:
    assert call() == result
