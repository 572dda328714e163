"""Tables as rows of arguments, and results as columns of a table: pandas, Polars and Arrow, through narwhals.

narwhals is optional. It is imported when a table is given, the libraries behind it never are: a table can
only come from a library that is loaded already.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preble_sgl.errors import InputError

if TYPE_CHECKING:
    import narwhals

LIBRARIES = ("pandas", "polars", "pyarrow")
SCALARS = (bool, int, float, str)


def as_rows(table: Any) -> list[dict[str, Any]]:
    """Return a table's rows by column name, or an iterable of mappings as dicts.

    What a table has as missing is None in a row. Raises InputError for what is neither, for a table that is
    not in memory, and if narwhals is not installed.
    """
    if not is_table(table):
        return _checked(table)
    frame = _frame(table)
    columns = [_values(column) for column in frame.iter_columns()]
    return [dict(zip(frame.columns, values, strict=True)) for values in zip(*columns, strict=True)]


def with_columns(table: Any, columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return a table of the same kind with these columns behind its own.

    A column of booleans, numbers or texts stays one. In any other column, texts stay as they are and all else
    goes in as JSON text. None becomes what the library has as missing. Raises InputError for what is no table
    in memory, for a column that the table has already, and for one of another length.
    """
    if not is_table(table):
        raise InputError(f"{type(table).__name__} is no pandas, Polars or Arrow table")
    frame = _frame(table)
    for name, values in columns.items():
        if name in frame.columns:
            raise InputError(f"the table has a column {name!r} already: rename it")
        if len(values) != len(frame):
            raise InputError(f"column {name!r} has {len(values)} values, but the table has {len(frame)} rows")
    return frame.with_columns(*(_series(name, columns[name], frame) for name in columns)).to_native()


def _checked(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
        raise InputError(f"rows are a table, or mappings from names to values in a list; not {_name(rows)}")
    checked = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {index}: must map names to values, but is {_name(row)}")
        checked.append(dict(row))
    return checked


def _name(value: object) -> str:
    return type(value).__name__


def is_table(value: object) -> bool:
    """Return whether a value is of a pandas, Polars or Arrow class."""
    return any(cls.__module__.partition(".")[0] in LIBRARIES for cls in type(value).__mro__)


def _frame(table: Any) -> "narwhals.DataFrame[Any]":
    try:
        import narwhals
    except ImportError:
        raise InputError("tables need narwhals: pip install narwhals") from None
    try:
        frame: narwhals.DataFrame[Any] = narwhals.from_native(table, eager_only=True)
        repeated = len(set(frame.columns)) < len(frame.columns)
    except narwhals.exceptions.DuplicateError:
        repeated = True
    except TypeError:
        raise InputError(
            f"{_name(table)} is no table in memory: collect it, or make it a DataFrame or an Arrow Table"
        ) from None
    if repeated:
        raise InputError("two columns of the table have the same name: rename one")
    return frame


def _values(series: "narwhals.Series[Any]") -> list[Any]:
    missing = series.is_null().to_list()
    return [None if gone else value for value, gone in zip(series.to_list(), missing, strict=True)]


def _series(name: str, values: Sequence[Any], frame: "narwhals.DataFrame[Any]") -> "narwhals.Series[Any]":
    import narwhals

    is_empty = all(value is None for value in values)
    # Of nothing but None no library guesses that it might be text.
    dtype = narwhals.String() if is_empty else None
    return narwhals.new_series(name, _plain(values), dtype, backend=frame.implementation)


def _plain(values: Sequence[Any]) -> list[Any]:
    """Return values of one kind: as they are if they have one, else texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds.issubset(SCALARS):
        return list(values)
    return [None if value is None else _text(value) for value in values]


def _text(value: Any) -> str:
    from pydantic_core import to_json

    if isinstance(value, str):
        return str.__str__(value)
    return to_json(value, serialize_unknown=True).decode()
