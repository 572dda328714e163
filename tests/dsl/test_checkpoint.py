"""Checkpoints: what is in the file after a kill at any byte, and whose file it is."""

import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import pytest
from pydantic import BaseModel, ConfigDict, Field, computed_field

from preble_sgl.core import Usage
from preble_sgl.dsl.checkpoint import Checkpoint, SavedRow
from preble_sgl.errors import InputError

ROWS: list[dict[str, Any]] = [{"word": word, "times": 2} for word in ("one", "two", "three", "four")]
USAGE = Usage(prompt_tokens=10, cached_tokens=4, output_tokens=3)
HEADER = b'{"format":1,"program":"shout"}\n'


class Grade(BaseModel):
    """What a program may return: with an alias, and with a field that is worked out from others."""

    model_config = ConfigDict(extra="forbid")
    points: int
    remark: str = Field(alias="Remark")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.points > 4


class BetterGrade(Grade):
    """More than a `Grade` says."""

    praise: str


@dataclass(frozen=True)
class Point:
    """A dataclass that pydantic knows how to write."""

    x: int
    tags: frozenset[str]


class Pair(NamedTuple):
    """A tuple with names."""

    left: int
    right: str


class Opaque:
    """A class of which pydantic knows nothing."""


class Text(str):
    """A type that pydantic has no schema for, but JSON a form."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@contextmanager
def opened(
    path: Path, rows: Sequence[dict[str, Any]] = ROWS, result_type: Any = None
) -> Iterator[Checkpoint]:
    with Checkpoint.opened(path, program="shout", rows=rows, result_type=result_type) as checkpoint:
        yield checkpoint


def save(path: Path, *indexes: int, rows: Sequence[dict[str, Any]] = ROWS) -> None:
    """Write rows whose value is ten times their index."""
    with opened(path, rows) as checkpoint:
        for index in indexes:
            checkpoint.write(index, index * 10, 1, USAGE)


def saved(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> dict[int, Any]:
    with opened(path, rows) as checkpoint:
        return {index: row.value for index, row in checkpoint.finished.items()}


# What is kept


def test_a_new_file_begins_with_format_and_program(path: Path) -> None:
    with opened(path) as checkpoint:
        assert checkpoint.finished == {}
        assert path.read_bytes() == HEADER


def test_a_line_holds_row_key_value_and_usage(path: Path) -> None:
    with opened(path) as checkpoint:
        checkpoint.write(2, ["x\n"], 5, USAGE)
        assert checkpoint.finished == {2: SavedRow(["x\n"], 5, USAGE)}
    line = orjson.loads(path.read_bytes().splitlines()[1])
    assert len(line.pop("key")) == 32
    assert line == {
        "row": 2,
        "value": ["x\n"],
        "usage": {"calls": 5, "prompt_tokens": 10, "cached_tokens": 4, "output_tokens": 3},
    }


def test_rows_come_back_in_the_order_in_which_they_finished(path: Path) -> None:
    save(path, 3, 0)
    save(path, 2)
    with opened(path) as checkpoint:
        assert list(checkpoint.finished) == [3, 0, 2]
        assert checkpoint.finished[3] == SavedRow(30, 1, USAGE)


@pytest.mark.parametrize(
    ("value", "result_type"),
    [
        (None, None),
        (None, Signature.empty),
        ({"a": [1, 2.5, "ü\u2028", True, None]}, Signature.empty),
        (2**70 + 1, None),
        (0.1 + 0.2, Any),
        ({"a": 1}, "dict[str, int]"),
        (None, int | None),
        (1, float),
        ("yes", Literal["yes", "no"]),
        ((1, "a"), tuple[int, str]),
        (Pair(1, "a"), Pair),
        ({3: b"bytes"}, dict[int, bytes]),
        (Point(1, frozenset({"a", "b"})), Point),
        ([Grade(points=5, Remark="good")], list[Grade]),
        (BetterGrade(points=5, Remark="good", praise="!"), BetterGrade | Grade),
        ([1, 2], Opaque),
        (Text("a"), Text),
    ],
)
def test_a_value_is_the_same_when_it_is_read_back(path: Path, value: Any, result_type: Any) -> None:
    with opened(path, result_type=result_type) as checkpoint:
        checkpoint.write(0, value, 1, USAGE)
    with opened(path, result_type=result_type) as checkpoint:
        read = checkpoint.finished[0].value
    assert read == value
    if result_type not in (float, Text):
        assert type(read) is type(value)


@pytest.mark.parametrize(
    ("value", "result_type", "reason"),
    [
        (Opaque(), None, r"this Opaque does not \(Unable to serialize unknown type"),
        (Opaque(), Opaque, r"this Opaque does not \(Unable to serialize unknown type"),
        ((1, 2), None, r"this tuple does not \(it would be read back as \[1, 2\]\)"),
        (Grade(points=1, Remark=""), Any, r"this Grade does not \(it would be read back as \{"),
        (BetterGrade(points=1, Remark="", praise=""), Grade, "this BetterGrade does not"),
        ({1: "a"}, None, r"read back as \{'1': 'a'\}"),
        (float("-inf"), None, "read back as None"),
        ("\ud800", None, "surrogates not allowed"),
        (None, str, "valid string"),
        ([1], list["Undefined"], "not fully defined"),  # type: ignore[name-defined]  # noqa: F821
    ],
)
def test_a_value_that_would_not_be_the_same_is_refused_and_leaves_no_trace(
    path: Path, value: Any, result_type: Any, reason: str
) -> None:
    with opened(path, result_type=result_type) as checkpoint:
        with pytest.raises(InputError, match=f"row 3: a checkpoint needs results that fit JSON.*{reason}"):
            checkpoint.write(3, value, 1, USAGE)
        assert checkpoint.finished == {}
    assert path.read_bytes() == HEADER


def test_a_row_is_written_once(path: Path) -> None:
    save(path, 1)
    with opened(path) as checkpoint, pytest.raises(AssertionError, match="row 1 finished twice"):
        checkpoint.write(1, 10, 1, USAGE)


# Whose rows they are


def test_there_may_be_more_rows_than_before(path: Path) -> None:
    save(path, 1, rows=ROWS[:2])
    assert saved(path) == {1: 10}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
        ({"a": 2**70, "b": "\ud800"}, {"a": 2**70, "b": "\ud800"}),
        ({"a": Point(1, frozenset())}, {"a": Point(1, frozenset())}),
        ({"a": 1 + 2j}, {"a": 1 + 2j}),
        ({"a": (1, 2)}, {"a": [1, 2]}),
    ],
)
def test_rows_of_equal_arguments_are_the_same_row(
    path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    save(path, 0, rows=[before])
    assert saved(path, rows=[after]) == {0: 0}


def test_a_row_counts_as_it_was_when_the_batch_began(path: Path) -> None:
    rows: list[dict[str, Any]] = [{"words": []}]
    with opened(path, rows) as checkpoint:
        rows[0]["words"].append("added by the program")
        checkpoint.write(0, 0, 1, USAGE)
    assert saved(path, rows=[{"words": []}]) == {0: 0}


def test_sets_are_the_same_row_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from preble_sgl.dsl.checkpoint import Checkpoint; from preble_sgl.core import Usage\n"
        "rows = [{'tags': [{'apple', 'pear', 'plum', 'fig'}, frozenset({('a', 1), ('b', 2)})]}]\n"
        "with Checkpoint.opened(sys.argv[1], program='p', rows=rows, result_type=None) as checkpoint:\n"
        "    checkpoint.write(0, 0, 1, Usage())"
    )
    for seed in range(3):
        command = [sys.executable, "-c", code, str(tmp_path / f"{seed}.jsonl")]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": str(seed)})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


# After a kill


def test_a_last_line_torn_at_any_byte_is_cut_off_and_its_row_runs_again(path: Path) -> None:
    save(path, 0, 1, 2)
    whole = path.read_bytes()
    kept = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for size in range(len(kept), len(whole)):
        path.write_bytes(whole[:size])
        assert saved(path) == {0: 0, 1: 10}
        assert path.read_bytes() == kept
        save(path, 2)
        assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_cut_off(path: Path) -> None:
    save(path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 20 + b"\n")
    assert saved(path) == {0: 0}
    assert path.read_bytes() == whole


def test_a_header_torn_at_any_byte_is_begun_anew(path: Path) -> None:
    for size in range(len(HEADER)):
        path.write_bytes(HEADER[:size])
        assert saved(path) == {}
        assert path.read_bytes() == HEADER


@contextmanager
def no_file_grows_beyond(num_bytes: int) -> Iterator[None]:
    """Let writes come to an end in the middle of a line, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_of_as_it_is_and_once_there_is_room_the_file_goes_on(path: Path) -> None:
    with opened(path) as checkpoint:
        checkpoint.write(0, 0, 1, USAGE)
        size = path.stat().st_size
        with no_file_grows_beyond(size + 7), pytest.raises(OSError, match="File too large") as caught:
            checkpoint.write(1, 10, 1, USAGE)
        assert caught.value.errno == errno.EFBIG
        assert path.stat().st_size == size + 7
        assert list(checkpoint.finished) == [0]
        checkpoint.write(2, 20, 1, USAGE)
    assert saved(path) == {0: 0, 2: 20}


@pytest.mark.parametrize("seed", range(100))
def test_a_batch_killed_at_random_bytes_ends_with_every_row_once(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [{"i": i, "text": "ä" * rng.randrange(20)} for i in range(rng.randint(1, 12))]
    for _ in range(rng.randrange(6)):
        _run_some(path, rows, rng)
        os.truncate(path, rng.randint(0, path.stat().st_size))
    with opened(path, rows) as checkpoint:
        _finish(checkpoint, [i for i in range(len(rows)) if i not in checkpoint.finished])
    assert saved(path, rows) == {i: i * 10 for i in range(len(rows))}
    written = [orjson.loads(line)["row"] for line in path.read_bytes().splitlines()[1:]]
    assert sorted(written) == list(range(len(rows)))


def _run_some(path: Path, rows: list[dict[str, Any]], rng: random.Random) -> None:
    with opened(path, rows) as checkpoint:
        assert all(row.value == index * 10 for index, row in checkpoint.finished.items())
        to_run = [i for i in range(len(rows)) if i not in checkpoint.finished]
        _finish(checkpoint, rng.sample(to_run, rng.randint(0, len(to_run))))


def _finish(checkpoint: Checkpoint, indexes: Sequence[int]) -> None:
    for index in indexes:
        checkpoint.write(index, index * 10, 1, USAGE)


# Refusals


def test_a_file_in_use_is_refused_until_it_is_let_go(path: Path) -> None:
    with opened(path), pytest.raises(InputError, match=r"out\.jsonl: is in use by another process"):
        saved(path)
    assert saved(path) == {}


def test_another_process_that_has_the_file_is_noticed(path: Path) -> None:
    code = (
        "import sys; from preble_sgl.dsl.checkpoint import Checkpoint\n"
        "with Checkpoint.opened(sys.argv[1], program='shout', rows=[], result_type=None):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="is in use by another process"):
            saved(path)
        process.kill()
    assert saved(path) == {}


def test_an_error_of_the_batch_passes_through_and_lets_the_file_go(path: Path) -> None:
    with pytest.raises(BlockingIOError, match="of the batch"), opened(path):
        raise BlockingIOError("of the batch")
    assert saved(path) == {}


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b'{"format":1,"program":"whisper"}\n', "line 1: the checkpoint of program 'whisper'"),
        (b'{"format":2,"program":"shout"}\n', "line 1: format 2 is not known here, only 1"),
        (b"my notes\n", "line 1: not the header of a checkpoint"),
        (b"my notes", "line 1: not the header of a checkpoint"),
        (b"[1]\n", "line 1: not the header of a checkpoint"),
        (b'{"format":1,"program":"wh', "line 1: not the header of a checkpoint"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(path: Path, first: bytes, message: str) -> None:
    path.write_bytes(first)
    with pytest.raises(InputError, match=message):
        saved(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"\n", "line 3: is broken, and not the last line"),
        (b'{"row":1,\n', "line 3: is broken, and not the last line"),
        (b"12\n", "line 3: line: Input should be an object"),
        (b'{"row":true,"key":"","value":1,"usage":{}}\n', "line 3: row: Input should be a valid integer"),
        (b'{"row":1,"key":"","usage":{"calls":1}}\n', "line 3: value: Field required"),
    ],
)
def test_a_broken_line_in_the_middle_is_named_and_the_file_left_alone(
    path: Path, broken: bytes, message: str
) -> None:
    save(path, 0, 2)
    header, first, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + first + broken + last)
    with pytest.raises(InputError, match=message):
        saved(path)
    assert path.read_bytes() == header + first + broken + last


def test_other_rows_are_refused(path: Path) -> None:
    save(path, 0, 3)
    other = [*ROWS[:3], {"word": "five", "times": 2}]
    message = (
        "line 3: row 3 is not the row that the checkpoint was written for: give another file, or delete it"
    )
    with pytest.raises(InputError, match=message):
        saved(path, other)
    with pytest.raises(InputError, match="line 3: row 3 is not among the 3 rows given: give another file"):
        saved(path, ROWS[:3])


def test_a_row_that_is_there_twice_is_refused(path: Path) -> None:
    save(path, 1)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(InputError, match="line 3: row 1 is there twice"):
        saved(path)


def test_a_value_of_another_result_type_is_refused(path: Path) -> None:
    save(path, 1)
    message = (
        r"line 2: the value of row 1 is not of the program's result type \(Input should be a valid array\)"
    )
    with pytest.raises(InputError, match=message), opened(path, result_type=list[int]):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", r"cannot be opened \(Is a directory\)"),
        ("missing/out.jsonl", r"cannot be opened \(No such file or directory\)"),
    ],
)
def test_a_path_that_can_be_no_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        saved(tmp_path / name)


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="/dev/null: is not a file"):
        saved(Path(os.devnull))
