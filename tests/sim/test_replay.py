"""A recorded trace comes back whole, in order, and with its sharing; or the file is refused with a reason."""

import csv
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preble_sgl.core import common_prefix_len
from preble_sgl.errors import InputError
from preble_sgl.sim.replay import read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a trace and return its path."""

    def text(content: str) -> Path:
        path = tmp_path / "trace"
        path.write_text(content)
        return path

    return text


def mooncake(timestamp: float, input_length: int, output_length: int, *hash_ids: int) -> str:
    row = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length}
    return orjson.dumps(row | {"hash_ids": hash_ids}).decode() + "\n"


def test_equal_blocks_are_equal_prefixes(write: Write) -> None:
    rows = mooncake(0, 1200, 10, 7, 8, 9), mooncake(500, 1500, 20, 7, 8, 10), mooncake(750, 600, 1, 3, 8)
    first, second, third = read_trace(write("".join(rows)))
    assert [(one.at, one.input_len, one.output_len) for one in (first, second, third)] == [
        (0.0, 1200, 10),
        (0.5, 1500, 20),
        (0.75, 600, 1),
    ]
    assert [len(one.prompt()) for one in (first, second, third)] == [1200, 1500, 600]
    assert common_prefix_len(first.prompt().tobytes(), second.prompt().tobytes()) == 1024
    assert common_prefix_len(first.prompt().tobytes(), third.prompt().tobytes()) == 0
    assert first.prompt()[512:600] == third.prompt()[512:]


def test_a_partial_block_begins_as_the_whole_one(write: Write) -> None:
    short, long = read_trace(write(mooncake(0, 513, 1, 1, 2) + mooncake(1, 1024, 1, 1, 2)))
    assert short.prompt() == long.prompt()[:513]


def test_a_request_becomes_a_session_of_one_turn(write: Write) -> None:
    (request,) = read_trace(write(mooncake(0, 700, 30, 5, 6)))
    (turn,) = request.session().turns
    assert turn.new == request.prompt()
    assert len(turn.output) == 30
    assert request.session() == request.session()
    assert request.session().group == 5


def test_azure_rows_keep_their_times_to_the_microsecond_and_share_nothing(write: Write) -> None:
    rows = "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319600,3180,8\n"
    first, second = read_trace(write(HEADER + rows))
    assert (first.at, first.input_len, first.output_len, first.line) == (0.0, 4808, 10, 2)
    assert second.at == pytest.approx(0.052, abs=1e-6)
    assert len(second.prompt()) == 3180
    assert common_prefix_len(first.prompt().tobytes(), second.prompt().tobytes()) == 0


def test_the_later_azure_format_is_read_as_well(write: Write) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 00:00:01+00:00,2399,6\r\n"
    first, second = read_trace(write(HEADER.replace("\n", "\r\n") + rows))
    assert second.at - first.at == pytest.approx(0.99007, abs=1e-6)


def test_rows_out_of_order_are_sorted_and_ties_stay_as_written(write: Write) -> None:
    rows = mooncake(900, 1, 1, 1) + mooncake(100, 1, 2, 2) + "\n" + mooncake(100, 1, 3, 3)
    assert [(one.at, one.output_len, one.line) for one in read_trace(write(rows))] == [
        (0.0, 2, 2),
        (0.0, 3, 4),
        (0.8, 1, 1),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a trace; give JSON lines with timestamp"),
        ("a,b,c\n1,2,3\n", "not a trace"),
        (HEADER, "holds no request; add rows after the first line"),
        (mooncake(0, 5, 1, 1) + "{oops\n", "line 2: not JSON"),
        (mooncake(0, 5, 1, 1) + "[1]\n", r"line 2: not an object; write one \{…\} per line"),
        ('{"timestamp": 0}\n', "line 1: input_length is missing; add it"),
        (mooncake(0, 0, 1), "line 1: input_length=0, a request needs a prompt of 1 token or more; remove"),
        (mooncake(0, -3, 1), "input_length=-3, must be a whole number of tokens"),
        (mooncake(0, 5, 1, 1).replace("5", "5.0"), "input_length=5.0, must be a whole number"),
        (mooncake(0, 5, 1, 1).replace("5", "true"), "input_length=True"),
        (mooncake(0, 513, 1, 1), "hash_ids has 1 ids, but input_length=513 needs 2 blocks of 512 tokens"),
        (mooncake(0, 5, 1, 1).replace("[1]", '["a"]'), "hash_ids must be a list of whole numbers"),
        (mooncake(0, 5, 1, 1).replace("[1]", "1"), "hash_ids must be a list"),
        (mooncake(0, 5, 1, 1).replace(":0,", ":null,"), "timestamp=None, must be a number of milliseconds"),
        (HEADER + "2023-11-16 18:17:03.97,0,10\n", "line 2: ContextTokens=0, a request needs a prompt of 1"),
        (HEADER + "2023-11-16 18:17:03.97,12,ten\n", "line 2: GeneratedTokens='ten', must be a whole number"),
        (HEADER + f"2023-11-16 18:17:03.97,{'9' * 5000},1\n", "must be a whole number of tokens"),
        (HEADER + "2023-11-16 18:17:03.97,12\n", "line 2: 2 columns, must be TIMESTAMP,ContextTokens,Gen"),
        (HEADER + "16.11.2023 18:17,12,1\n", "line 2: TIMESTAMP='16.11.2023 18:17', must look like 2023"),
        (HEADER + "2023-02-29 18:17:03,12,1\n", "TIMESTAMP='2023-02-29 18:17:03', there is no such day"),
        (HEADER + "2023-11-16 24:17:03,12,1\n", "there is no such time of day"),
        (HEADER + '2023-11-16 18:17:03,"12"x,1\n', "line 2: not CSV"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_line_and_remedy(
    write: Write, content: str, message: str
) -> None:
    path = write(content)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "absent")
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\xff\x00")
    with pytest.raises(InputError, match="is not UTF-8 text; unpack or convert it"):
        read_trace(tmp_path / "packed")


ROWS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 3000), st.integers(0, 500)), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_no_row_is_lost(write: Write, rows: list[tuple[int, int, int]], rng: Random) -> None:
    lines = [
        mooncake(at, num_in, num_out, *(rng.randrange(5) for _ in range(-(-num_in // 512))))
        for at, num_in, num_out in rows
    ]
    first_at = min(at for at, _, _ in rows)
    found = [(one.at, one.input_len, one.output_len) for one in read_trace(write("".join(lines)))]
    assert found == sorted(found, key=lambda row: row[0])
    expected = sorted((at - first_at, num_in, num_out) for at, num_in, num_out in rows)
    assert sorted((round(at * 1000), num_in, num_out) for at, num_in, num_out in found) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text() | st.text().map(lambda text: HEADER + text) | st.text().map(lambda text: "{" + text))
def test_whatever_stands_in_the_file_is_read_or_refused(write: Write, content: str) -> None:
    path = write("")
    path.write_text(content, encoding="utf-8", errors="replace")
    with suppress(InputError):
        assert read_trace(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.text(max_size=12), min_size=3, max_size=3), min_size=1))
def test_odd_cells_are_refused_not_skipped(write: Write, cells: list[list[str]]) -> None:
    packed = io.StringIO()
    csv.writer(packed).writerows(cells)
    path = write("")
    path.write_text(HEADER + packed.getvalue(), encoding="utf-8", errors="replace", newline="")
    with pytest.raises(InputError):
        read_trace(path)
