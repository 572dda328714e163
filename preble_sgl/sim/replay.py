"""Read recorded requests: when each arrived, how long it was, and which blocks of prompt it shared.

Two formats, told apart by their first line. Mooncake's JSON lines (Qin et al., FAST 2025): `timestamp` in
milliseconds, `input_length`, `output_length`, and `hash_ids`, one for each block of 512 tokens, the last of
which may be partial. Azure's CSV (LLM inference traces of 2023 and 2024): TIMESTAMP, ContextTokens,
GeneratedTokens, with nothing known about sharing. Every row becomes a request, or the file is refused.
"""

import csv
import random
import re
from calendar import monthrange, timegm
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO
from math import isfinite
from pathlib import Path

import orjson

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.errors import InputError
from preble_sgl.sim.workloads import Session, Turn, random_tokens

MOONCAKE_BLOCK = 512
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(\.\d+)?(?:\+00:00|Z)?")
TOKENS = re.compile(r"\s*\d{1,15}\s*")

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One recorded request. `at`: seconds after the first of its trace; `line`: where it stands in the file.

    Its tokens are made up from `block_ids`, each the name of `block_len` tokens: equal ids, equal tokens.
    """

    at: float
    line: int
    input_len: int
    output_len: int
    block_ids: tuple[int, ...]
    block_len: int

    def prompt(self) -> TokenIds:
        """Return the tokens. Made anew at each call: those of a whole trace can fill the memory."""
        ids = token_ids()
        for block_id in self.block_ids:
            ids += random_tokens(random.Random(block_id), self.block_len)
        return ids[: self.input_len]

    def session(self) -> Session:
        """Return the request as a session of one turn; its group is its first block."""
        output = random_tokens(random.Random(f"output of line {self.line}"), self.output_len)
        return Session((Turn(self.prompt(), output),), self.block_ids[0])


def read_trace(path: Path) -> list[TracedRequest]:
    """Return the requests of a trace as they arrive. Raises InputError, naming file and line."""
    text = _read(path)
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        requests = list(_mooncake(path, text))
    elif first.split(",") == AZURE_COLUMNS:
        requests = list(_azure(path, text))
    else:
        raise InputError(
            f"{path}: not a trace; give JSON lines with timestamp, input_length, output_length and hash_ids, "
            f"or CSV that begins with {','.join(AZURE_COLUMNS)}"
        )
    if not requests:
        raise InputError(f"{path}: holds no request; add rows after the first line")
    requests.sort(key=lambda request: request.at)
    return [replace(request, at=request.at - requests[0].at) for request in requests]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a trace") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; unpack or convert it") from error


def _mooncake(path: Path, text: str) -> Iterator[TracedRequest]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _mooncake_request(f"{path}, line {number}", number, line)


def _mooncake_request(where: str, number: int, line: str) -> TracedRequest:
    row = _json_object(where, line)
    request = TracedRequest(
        at=_milliseconds(where, row) / 1000,
        line=number,
        input_len=_length(where, row, "input_length", low=1),
        output_len=_length(where, row, "output_length", low=0),
        block_ids=_block_ids(where, row),
        block_len=MOONCAKE_BLOCK,
    )
    needed = -(-request.input_len // MOONCAKE_BLOCK)
    if len(request.block_ids) != needed:
        raise InputError(
            f"{where}: hash_ids has {len(request.block_ids)} ids, but input_length={request.input_len} needs "
            f"{needed} blocks of {MOONCAKE_BLOCK} tokens; correct one of them"
        )
    return request


def _json_object(where: str, line: str) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); write one object per line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object; write one {{…}} per line")
    return row


def _milliseconds(where: str, row: Row) -> float:
    value = _field(where, row, "timestamp")
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InputError(f"{where}: timestamp={value!r}, must be a number of milliseconds")
    return value


def _block_ids(where: str, row: Row) -> tuple[int, ...]:
    ids = _field(where, row, "hash_ids")
    if not isinstance(ids, list) or not all(type(block_id) is int and block_id >= 0 for block_id in ids):
        raise InputError(f"{where}: hash_ids must be a list of whole numbers from 0 on, one for each block")
    return tuple(ids)


def _length(where: str, row: Row, name: str, low: int) -> int:
    """Return a number of tokens, which JSON writes as a number and CSV as text."""
    value = _field(where, row, name)
    if isinstance(value, str) and TOKENS.fullmatch(value):
        value = int(value)
    if type(value) is not int or value < 0:
        raise InputError(f"{where}: {name}={value!r}, must be a whole number of tokens")
    if value < low:
        raise InputError(f"{where}: {name}=0, a request needs a prompt of 1 token or more; remove the row")
    return value


def _field(where: str, row: Row, name: str) -> object:
    if name not in row:
        raise InputError(f"{where}: {name} is missing; add it")
    return row[name]


def _azure(path: Path, text: str) -> Iterator[TracedRequest]:
    rows = csv.reader(StringIO(text), strict=True)
    try:
        for cells in rows:
            if cells and cells != AZURE_COLUMNS:
                yield _azure_request(f"{path}, line {rows.line_num}", rows.line_num, cells)
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error}); correct the line") from error


def _azure_request(where: str, number: int, cells: list[str]) -> TracedRequest:
    if len(cells) != len(AZURE_COLUMNS):
        raise InputError(f"{where}: {len(cells)} columns, must be {','.join(AZURE_COLUMNS)}")
    row: Row = dict(zip(AZURE_COLUMNS, cells, strict=True))
    input_len = _length(where, row, "ContextTokens", low=1)
    output_len = _length(where, row, "GeneratedTokens", low=0)
    return TracedRequest(_seconds(where, cells[0]), number, input_len, output_len, (number,), input_len)


def _seconds(where: str, timestamp: str) -> float:
    """Return the seconds since 1970 of a time in UTC, to the microsecond or so that a float holds."""
    found = TIMESTAMP.fullmatch(timestamp.strip())
    if found is None:
        raise InputError(f"{where}: TIMESTAMP={timestamp!r}, must look like 2023-11-16 18:17:03.9799600")
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    if not (year and 1 <= month <= 12 and 1 <= day <= monthrange(year, month)[1]):
        raise InputError(f"{where}: TIMESTAMP={timestamp!r}, there is no such day")
    if not (hour < 24 and minute < 60 and second < 60):
        raise InputError(f"{where}: TIMESTAMP={timestamp!r}, there is no such time of day")
    return timegm((year, month, day, hour, minute, second)) + float(found[7] or 0)
