"""Tables of three libraries as rows, and results as their columns."""

import math
import sys
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel

from preble_sgl.dsl.tables import as_rows, with_columns
from preble_sgl.errors import InputError

Make = Callable[[dict[str, list[Any]]], Any]

KINDS = [
    pytest.param(make, id=name)
    for name, make in {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.table}.items()
]
every_kind = pytest.mark.parametrize("make", KINDS)


class Verdict(BaseModel):
    score: int
    why: str = "so"


class Mood(StrEnum):
    CALM = "calm"


def column(table: Any, name: str) -> list[Any]:
    """Return a column as the library has it."""
    values = table[name]
    return list(values.to_pylist() if isinstance(table, pa.Table) else values.to_list())


# Rows


@every_kind
def test_a_table_becomes_rows_by_column_name(make: Make) -> None:
    when = datetime(2020, 1, 2)
    rows = as_rows(make({"text": ["a", "b"], "n": [1, 2], "ok": [True, False], "when": [when, when]}))
    assert rows == [
        {"text": "a", "n": 1, "ok": True, "when": when},
        {"text": "b", "n": 2, "ok": False, "when": when},
    ]
    assert [type(value) for value in rows[0].values()][:3] == [str, int, bool]


@every_kind
def test_what_a_table_lacks_is_none(make: Make) -> None:
    assert as_rows(make({"text": ["a", None], "n": [None, 2]})) == [
        {"text": "a", "n": None},
        {"text": None, "n": 2},
    ]


def test_not_a_number_is_missing_in_pandas_and_a_number_in_polars() -> None:
    assert as_rows(pd.DataFrame({"n": [math.nan]})) == [{"n": None}]
    assert math.isnan(as_rows(pl.DataFrame({"n": [math.nan]}))[0]["n"])


@every_kind
def test_a_table_may_have_no_rows(make: Make) -> None:
    assert as_rows(make({"text": []})) == []


def test_mappings_pass_as_dicts_of_their_own() -> None:
    given = [{"a": 1}, {"b": 2}]
    rows = as_rows(given)
    assert rows == given
    assert rows[0] is not given[0]
    assert as_rows(row for row in given) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["text"], "row 0: must map names to values, but is str"),
        ([{"a": 1}, 2], "row 1: must map names to values, but is int"),
        ({"a": 1}, "a table, or mappings from names to values in a list; not dict"),
        (7, "a table, or mappings from names to values in a list; not int"),
    ],
)
def test_what_are_no_rows_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_rows(given)


@pytest.mark.parametrize(
    "given",
    [pl.LazyFrame({"a": [1]}), pl.Series([1]), pd.Series([1]), pa.record_batch({"a": [1]})],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_table_in_memory_is_refused(given: Any) -> None:
    message = f"{type(given).__name__} is no table in memory: collect it, or make it a DataFrame"
    with pytest.raises(InputError, match=message):
        as_rows(given)
    with pytest.raises(InputError, match=message):
        with_columns(given, {"value": [1]})


@pytest.mark.parametrize(
    "given",
    [pd.DataFrame([[1, 2]], columns=["a", "a"]), pa.table([[1], [2]], names=["a", "a"])],
    ids=["pandas", "arrow"],
)
def test_two_columns_of_one_name_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="two columns of the table have the same name: rename one"):
        as_rows(given)


def test_without_narwhals_only_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "narwhals", None)
    assert as_rows([{"a": 1}]) == [{"a": 1}]
    for use in (as_rows, lambda table: with_columns(table, {"value": [1]})):
        with pytest.raises(InputError, match="tables need narwhals: pip install narwhals"):
            use(pd.DataFrame({"a": [1]}))


# Columns


@every_kind
def test_columns_are_appended_to_a_table_of_the_same_kind(make: Make) -> None:
    table = make({"a": [1, 2]})
    result = with_columns(table, {"value": ["x", "y"], "seconds": [1, 2.5]})
    assert type(result) is type(table)
    assert as_rows(result) == [{"a": 1, "value": "x", "seconds": 1.0}, {"a": 2, "value": "y", "seconds": 2.5}]
    assert as_rows(table) == [{"a": 1}, {"a": 2}]


@every_kind
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([Verdict(score=1), Verdict(score=2, why="é")], ['{"score":1,"why":"so"}', '{"score":2,"why":"é"}']),
        ([[1, 2], {"b": None}], ["[1,2]", '{"b":null}']),
        (["text", Verdict(score=1)], ["text", '{"score":1,"why":"so"}']),
        ([1, "text"], ["1", "text"]),
        ([True, 2], ["true", "2"]),
        ([Mood.CALM, Mood.CALM], ["calm", "calm"]),
        ([ValueError("late"), "text"], ['"late"', "text"]),
    ],
    ids=[
        "models",
        "containers",
        "a text and a model",
        "a number and a text",
        "a bool and a number",
        "enum",
        "other",
    ],
)
def test_what_is_no_scalar_goes_in_as_json(make: Make, values: list[Any], kept: list[str]) -> None:
    assert column(with_columns(make({"a": [1, 2]}), {"value": values}), "value") == kept


@every_kind
def test_none_is_missing_as_the_library_has_it(make: Make) -> None:
    table = with_columns(
        make({"a": [1, 2]}),
        {"text": ["x", None], "n": [None, 2], "value": [Verdict(score=1), None], "error": [None, None]},
    )
    assert as_rows(table)[1] == {"a": 2, "text": None, "n": 2, "value": None, "error": None}
    if isinstance(table, pd.DataFrame):
        assert table["error"].isna().all()
    else:
        assert column(table, "error") == [None, None]


def test_a_column_of_nothing_is_one_of_texts() -> None:
    nothing = {"error": [None]}
    assert with_columns(pl.DataFrame({"a": [1]}), nothing).schema["error"] == pl.String
    assert with_columns(pa.table({"a": [1]}), nothing).schema.field("error").type == pa.string()


def test_rows_of_a_pandas_frame_keep_their_labels() -> None:
    table = pd.DataFrame({"a": [1, 2]}, index=[7, 7])
    result = with_columns(table, {"value": ["x", "y"]})
    assert list(result.index) == [7, 7]
    assert list(result["value"]) == ["x", "y"]


@every_kind
def test_a_column_that_is_there_or_of_another_length_is_refused(make: Make) -> None:
    table = make({"value": [1, 2]})
    with pytest.raises(InputError, match="the table has a column 'value' already: rename it"):
        with_columns(table, {"value": [1, 2]})
    with pytest.raises(InputError, match="column 'error' has 1 values, but the table has 2 rows"):
        with_columns(table, {"error": ["late"]})


def test_columns_need_a_table() -> None:
    with pytest.raises(InputError, match="list is no pandas, Polars or Arrow table"):
        with_columns([{"a": 1}], {"value": [1]})
