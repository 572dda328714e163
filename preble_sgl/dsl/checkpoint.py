"""The file in which a batch keeps every row that has finished, so that a killed one can go on.

JSON lines: a header that names format and program, then one line for each finished row, in the order in
which they finished. Rows that failed are not written and run again. A line goes to the system at once, at the
end of the file, so whenever the process is killed at most the last line is torn; opening cuts it off, and
its row runs again. A row is known by its index and by a hash of its arguments, so that results are never
taken for those of other rows. An exclusive lock (flock) keeps a second batch from writing to the file.

This guards against a killed process, not against a machine that loses power: nothing waits for the disk.
"""

import fcntl
import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from preble_sgl.core import Usage
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
KEY_BYTES = 16
REMEDY = "give another file, or delete it"


@dataclass(frozen=True, slots=True)
class SavedRow:
    """One finished row as `RowResult` has it."""

    value: Any
    num_calls: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class _Counts:
    """The `usage` of a line."""

    calls: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Line:
    """A line after the header. `value` is parsed JSON, not yet a value of the program's result type."""

    row: int
    key: str
    value: Any
    usage: _Counts


class Checkpoint:
    """The finished rows of one batch, in memory and in a file."""

    __slots__ = ("_descriptor", "_finished", "_keys", "_size", "_values")

    def __init__(self, descriptor: int, keys: Sequence[str], values: "_Values") -> None:
        self._descriptor = descriptor
        self._keys = keys
        self._values = values
        self._finished: dict[int, SavedRow] = {}
        self._size = 0

    @classmethod
    @contextmanager
    def opened(
        cls, path: str | Path, *, program: str, rows: Sequence[Mapping[str, Any]], result_type: Any
    ) -> "Iterator[Checkpoint]":
        """Read what a file holds of a batch, and keep it open and locked for as long as the context lasts.

        A missing or empty file is begun, a torn last line is cut off, and there may be more rows than were
        saved. `result_type` is what the program is annotated to return; `Signature.empty`, None and types
        that pydantic does not know stand for any value that JSON can hold. Hashes all rows: O(size of the
        rows). Raises InputError when another process has the file, or when it is not of this program, these
        rows and this result type.
        """
        keys = [_row_key(row) for row in rows]
        with _locked(Path(path)) as descriptor:
            checkpoint = cls(descriptor, keys, _Values(result_type))
            checkpoint._resume(Path(path), program)
            yield checkpoint

    @property
    def finished(self) -> Mapping[int, SavedRow]:
        """The rows in the file, by index, in the order in which they finished."""
        return self._finished

    def write(self, index: int, value: Any, num_calls: int, usage: Usage) -> None:
        """Save a row that has finished.

        Raises InputError when the value would not be the same when read back from JSON, and the OSError of a
        full disk. Either way the row is not saved, and others can be.
        """
        assert index not in self._finished, f"row {index} finished twice"
        line = {
            "row": index,
            "key": self._keys[index],
            "value": orjson.Fragment(self._written(index, value)),
            "usage": {
                "calls": num_calls,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "output_tokens": usage.output_tokens,
            },
        }
        self._append(orjson.dumps(line) + b"\n")
        self._finished[index] = SavedRow(value, num_calls, usage)

    def _written(self, index: int, value: Any) -> bytes:
        try:
            return self._values.dump(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"row {index}: a checkpoint needs results that fit JSON, and this {type(value).__name__} "
                f"does not ({_reason(error)}); annotate the program's return type with a pydantic type"
            ) from error

    def _append(self, line: bytes) -> None:
        # A write that failed midway, as on a full disk, has left the beginning of a line.
        os.ftruncate(self._descriptor, self._size)
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._size += len(line)

    def _resume(self, path: Path, program: str) -> None:
        with open(self._descriptor, "rb", closefd=False) as file:
            header = _header(program)
            self._size = _read_header(path, file, header)
            if self._size == 0:
                self._append(header)
            else:
                self._read_rows(path, file)
                os.ftruncate(self._descriptor, self._size)

    def _read_rows(self, path: Path, file: BufferedReader) -> None:
        from pydantic import TypeAdapter

        lines: TypeAdapter[_Line] = TypeAdapter(_Line)
        for number, text in enumerate(file, 2):
            where = f"{path}, line {number}"
            line = _parsed(where, lines, text)
            if line is None and not file.read(1):
                return
            if line is None:
                raise InputError(f"{where}: is broken, and not the last line: {REMEDY}")
            self._check_row(where, line)
            self._finished[line.row] = self._saved(where, line)
            self._size += len(text)

    def _check_row(self, where: str, line: _Line) -> None:
        if not 0 <= line.row < len(self._keys):
            raise InputError(
                f"{where}: row {line.row} is not among the {len(self._keys)} rows given: {REMEDY}"
            )
        if line.row in self._finished:
            raise InputError(f"{where}: row {line.row} is there twice: {REMEDY}")
        if line.key != self._keys[line.row]:
            raise InputError(
                f"{where}: row {line.row} is not the row that the checkpoint was written for: {REMEDY}"
            )

    def _saved(self, where: str, line: _Line) -> SavedRow:
        try:
            value = self._values.load(line.value)
        except ValueError as error:
            raise InputError(
                f"{where}: the value of row {line.row} is not of the program's result type "
                f"({_reason(error)}): {REMEDY}"
            ) from error
        counts = line.usage
        usage = Usage(counts.prompt_tokens, counts.cached_tokens, counts.output_tokens)
        return SavedRow(value, counts.calls, usage)


class _Values:
    """How the results of one program are written as JSON and read back."""

    __slots__ = ("_adapter",)

    def __init__(self, result_type: Any) -> None:
        self._adapter = _adapter_of(result_type)

    def dump(self, value: Any) -> bytes:
        """Return a value as JSON on one line. Raises ValueError if it would not be the same when read."""
        from pydantic_core import from_json, to_json

        if self._adapter is None:
            text = to_json(value, inf_nan_mode="null")
        else:
            text = self._adapter.dump_json(value, by_alias=True, round_trip=True, warnings=False)
        read = self.load(from_json(text))
        if read != value:
            raise ValueError(f"it would be read back as {reprlib.repr(read)}")
        return text

    def load(self, parsed: Any) -> Any:
        """Turn parsed JSON into a value. Raises ValueError if it does not fit the result type."""
        from pydantic_core import to_json

        # By way of JSON again: only there do strict types take a text for a date, or a list for a tuple.
        return parsed if self._adapter is None else self._adapter.validate_json(to_json(parsed))


def _adapter_of(result_type: Any) -> "TypeAdapter[Any] | None":
    from pydantic import PydanticUserError, TypeAdapter

    # A text is an annotation that nobody could resolve.
    if result_type is Signature.empty or result_type is None or isinstance(result_type, str):
        return None
    try:
        return TypeAdapter(result_type)
    except PydanticUserError:
        return None


def _reason(error: Exception) -> str:
    """Return in one line what an error says."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return error.errors(include_url=False)[0]["msg"]
    return str(error).partition("\n")[0]


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file to read it and add to it, with nobody else doing the same."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); give the path of a file that can be written"
        ) from error
    try:
        _lock(path, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise InputError(f"{path}: is not a file; give the path of one")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{path}: is in use by another process; wait for it to end, or give another file"
        ) from error


def _header(program: str) -> bytes:
    return orjson.dumps({"format": FORMAT, "program": program}) + b"\n"


def _read_header(path: Path, file: BufferedReader, header: bytes) -> int:
    """Return the length of the first line, or 0 if the file was never begun or no further than into it."""
    line = file.readline()
    if not line.endswith(b"\n") and header.startswith(line):
        return 0
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not {"format", "program"} <= found.keys():
        raise InputError(f"{path}, line 1: not the header of a checkpoint: give another file")
    if found["format"] != FORMAT:
        raise InputError(
            f"{path}, line 1: format {found['format']!r} is not known here, only {FORMAT}: {REMEDY}"
        )
    if found["program"] != orjson.loads(header)["program"]:
        raise InputError(f"{path}, line 1: the checkpoint of program {found['program']!r}: {REMEDY}")
    return len(line)


def _parsed(where: str, lines: "TypeAdapter[_Line]", text: bytes) -> _Line | None:
    """Return a line, or None if it is torn or no JSON. Raises InputError if it is JSON of another kind."""
    from pydantic import ValidationError

    if not text.endswith(b"\n"):
        return None
    try:
        return lines.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            return None
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {field or 'line'}: {first['msg']}: {REMEDY}") from error


def _row_key(row: Mapping[str, Any]) -> str:
    """Return a hash of a row's arguments. What has no form in JSON counts by its `repr`."""
    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(_sets_in_order(row), fallback=repr)
    try:
        text = orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits, or a text that is not Unicode
        text = json.dumps(plain, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=KEY_BYTES).hexdigest()


def _sets_in_order(value: Any) -> Any:
    """Return a value with its sets as sorted lists: their own order differs from process to process."""
    if isinstance(value, Mapping):
        return {name: _sets_in_order(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_sets_in_order(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_sets_in_order, value), key=repr)
    return value
