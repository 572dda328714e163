"""Rows and fields in the order that shares most: tables by hand, and random ones against every order."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations, product
from statistics import fmean

import pytest

from preble_sgl.dsl import reorder
from preble_sgl.dsl.reorder import (
    Ordering,
    Rows,
    fields,
    order_fields,
    order_rows,
    ordered_fields,
    prefix_hits,
)
from preble_sgl.errors import InputError


def as_given(rows: Rows) -> Ordering:
    """Return the order that the table has."""
    return Ordering(tuple(range(len(rows))), tuple(tuple(row) for row in rows))


def table(names: str, *rows: str) -> list[dict[str, str]]:
    """Make a table from the names of its fields and, by row, its values."""
    return [dict(zip(names.split(), row.split(), strict=True)) for row in rows]


def random_tables(
    num: int, num_rows: int, num_fields: int, num_values: int
) -> Iterator[list[dict[str, str]]]:
    for seed in range(num):
        rng = random.Random(seed)
        values = {
            name: [f"{'x' * rng.randint(1, 6)}{i}" for i in range(rng.randint(1, num_values))]
            for name in "abcdefgh"[:num_fields]
        }
        yield [{name: rng.choice(texts) for name, texts in values.items()} for _ in range(num_rows)]


def prefixes(row: dict[str, str], order: Sequence[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    pairs = tuple((name, row[name]) for name in order)
    return (pairs[:end] for end in range(1, len(pairs) + 1))


def most_hits(rows: Sequence[dict[str, str]], orders: Iterable[Sequence[str]]) -> int:
    """Return what no order of rows can surpass: every prefix is computed once."""
    seen = Counter(prefix for row, order in zip(rows, orders, strict=True) for prefix in prefixes(row, order))
    return sum((count - 1) * len(prefix[-1][1]) for prefix, count in seen.items())


# Counting


def test_a_hit_is_what_a_row_shares_with_the_one_before_up_to_the_first_difference() -> None:
    rows = table("a b c", "one two three", "one two four", "one 2 four", "1 2 four")
    assert prefix_hits(rows, as_given(rows)) == (3 + 3) + 3 + 0
    assert prefix_hits(rows, Ordering((0, 3, 1, 2), as_given(rows).fields)) == 0 + 0 + 3
    assert prefix_hits(rows, as_given(rows), length=lambda text: 10) == 30


def test_equal_values_of_different_fields_are_no_hit() -> None:
    rows = table("a b", "same x", "x same")
    assert prefix_hits(rows, Ordering((0, 1), (("a", "b"), ("b", "a")))) == 0


def test_an_ordering_of_another_table_is_refused() -> None:
    rows = table("a", "x", "y")
    with pytest.raises(InputError, match="the ordering is of 2 rows, but there are 1"):
        prefix_hits(rows[:1], as_given(rows))


# Rows only


def test_rows_with_equal_first_fields_come_together() -> None:
    rows = table("product rating", "tea 5", "cup 1", "tea 4", "cup 5", "tea 5")
    ordering = order_rows(rows)
    assert ordering.rows == (1, 3, 2, 0, 4)
    assert set(ordering.fields) == {("product", "rating")}
    assert prefix_hits(rows, as_given(rows)) == 0
    assert prefix_hits(rows, ordering) == 3 + 3 + (3 + 1)


def test_rows_are_ordered_for_the_order_of_fields_that_is_asked_for() -> None:
    rows = table("product rating", "tea 5", "cup 1", "tea 4", "cup 5", "tea 5")
    ordering = order_rows(rows, fields=["rating", "product"])
    assert ordering.rows == (1, 2, 3, 0, 4)
    assert prefix_hits(rows, ordering) == 0 + 0 + 1 + (1 + 3)


def test_no_order_of_rows_has_more_hits_than_the_one_returned() -> None:
    for rows in random_tables(20, num_rows=5, num_fields=3, num_values=3):
        given = as_given(rows).fields
        best = max(prefix_hits(rows, Ordering(order, given)) for order in permutations(range(5)))
        assert prefix_hits(rows, order_rows(rows)) == best == most_hits(rows, given)


# Rows and fields


def test_fields_that_repeat_come_before_one_that_never_does() -> None:
    rows = table("id b c", "1 bb cc", "2 bb cc", "3 bb cc", "4 bb cc")
    ordering = order_fields(rows)
    assert set(ordering.fields) == {("b", "c", "id")}
    assert prefix_hits(rows, ordering) == 3 * (2 + 2)


def test_each_group_of_rows_begins_with_the_field_it_agrees_in() -> None:
    rows = table("a b c", *(f"A 1{i} 2{i}" for i in range(3)))
    rows += table("a b c", *(f"3{i} B 4{i}" for i in range(3)))
    rows += table("a b c", *(f"5{i} 6{i} C" for i in range(3)))
    ordering = order_fields(rows)
    assert [order[0] for order in ordering.fields] == list("aaabbbccc")
    assert prefix_hits(rows, ordering) == 3 * 2
    assert max(prefix_hits(rows, order_rows(rows, fields=order)) for order in permutations("abc")) == 2


def test_a_value_brings_what_depends_on_it_and_stands_behind_it() -> None:
    rows = table(
        *("review title category", "r1 samovar tea", "r2 mug cups", "r3 kettle tea", "r4 samovar tea"),
        *("r5 kettle tea", "r6 mug cups"),
    )
    ordering = order_fields(rows)
    assert set(ordering.fields) == {("category", "title", "review")}
    assert ordering.rows == (1, 5, 2, 4, 0, 3)
    cups, teas, titles = 4, 3 * 3, 3 + 6 + 7
    assert prefix_hits(rows, ordering) == cups + teas + titles


def test_the_length_of_what_depends_on_a_value_decides_between_values() -> None:
    rows = table("code text mood", "1 a-long-text sad", "2 b short", "1 a-long-text short", "2 c short")
    assert order_fields(rows).fields[2] == ("code", "text", "mood")
    assert order_fields(rows, length=lambda text: len(text) if len(text) < 9 else 0).fields[2][0] == "mood"


def test_where_nothing_is_gained_fields_keep_their_order() -> None:
    rows = table("b a", "1 2", "3 4", "5 6")
    assert order_fields(rows) == Ordering((0, 1, 2), (("b", "a"),) * 3)


def test_beyond_the_depth_limit_statistics_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table("a b c", "1 x yyy", "2 x yyy", "3 x zzz", "4 w zzz")
    monkeypatch.setattr(reorder, "MAX_DEPTH", 0)
    ordering = order_fields(rows)
    assert set(ordering.fields) == {("c", "b", "a")}
    assert prefix_hits(rows, ordering) == (3 + 1) + 3


def test_it_never_has_fewer_hits_than_any_simpler_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for depth, rows in product((0, 1, 8), random_tables(30, num_rows=40, num_fields=5, num_values=12)):
        monkeypatch.setattr(reorder, "MAX_DEPTH", depth)
        ordering = order_fields(rows)
        assert sorted(ordering.rows) == list(range(40))
        assert {frozenset(order) for order in ordering.fields} == {frozenset(rows[0])}
        hits = prefix_hits(rows, ordering)
        assert hits == most_hits(rows, ordering.fields)
        assert hits >= prefix_hits(rows, order_rows(rows)) >= prefix_hits(rows, as_given(rows))


def test_it_comes_near_the_best_of_all_orders_of_fields_and_rows() -> None:
    shares = []
    for rows in random_tables(40, num_rows=4, num_fields=3, num_values=4):
        orders = product(permutations("abc"), repeat=4)
        best = max(most_hits(rows, chosen) for chosen in orders)
        shares.append(prefix_hits(rows, order_fields(rows)) / best if best else 1.0)
    assert min(shares) >= 0.7
    assert fmean(shares) > 0.98


def test_the_outcome_does_not_depend_on_the_order_in_which_rows_are_given() -> None:
    for seed, rows in enumerate(random_tables(20, num_rows=30, num_fields=4, num_values=6)):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert prompts(rows, order_fields(rows)) == prompts(shuffled, order_fields(shuffled))


def prompts(rows: Rows, ordering: Ordering) -> list[list[tuple[str, str]]]:
    return [[(name, rows[i][name]) for name in ordering.fields[i]] for i in ordering.rows]


def test_each_text_is_measured_once() -> None:
    measured = []
    order_fields(
        table("a b", "x y", "x x", "y z"),
        length=lambda text: measured.append(text) or 1,  # type: ignore[func-returns-value]
    )
    assert sorted(measured) == ["x", "y", "z"]


def test_a_table_may_have_no_rows() -> None:
    assert order_rows([]) == order_rows([], fields=["a"]) == order_fields([]) == Ordering((), ())
    assert prefix_hits([], Ordering((), ())) == 0


def test_a_row_with_other_fields_is_named() -> None:
    rows = [{"a": "x", "b": "y"}, {"b": "y", "a": "x"}, {"a": "x", "c": "y"}]
    for order in (order_rows, order_fields):
        with pytest.raises(InputError, match="row 2 has the fields a, c, but row 0 has a, b"):
            order(rows)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_an_order_that_does_not_name_each_field_once_is_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="name each field of the rows once: a, b"):
        order_rows(table("a b", "x y"), fields=names)


# In a program


def test_fields_are_lines_in_the_order_in_which_they_are_written() -> None:
    assert fields(title="Tea", rating=5) == "title: Tea\nrating: 5"
    with ordered_fields(None):
        assert fields(title="Tea", rating=5) == "title: Tea\nrating: 5"


def test_fields_follow_the_order_of_the_row_and_others_come_last() -> None:
    with ordered_fields(("rating", "absent", "title")):
        assert fields(mood="calm", title="Tea", rating=5, b="c") == "rating: 5\ntitle: Tea\nmood: calm\nb: c"
        with ordered_fields(("mood",)):
            assert fields(title="Tea", mood="calm") == "mood: calm\ntitle: Tea"
        assert fields(title="Tea", rating=5) == "rating: 5\ntitle: Tea"


def test_an_order_ends_with_its_context_even_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), ordered_fields(("b", "a")):
        raise ZeroDivisionError
    assert fields(a=1, b=2) == "a: 1\nb: 2"


async def test_rows_that_run_at_once_have_their_own_orders() -> None:
    async def run(order: tuple[str, ...]) -> str:
        with ordered_fields(order):
            await asyncio.sleep(0)
            return fields(a=1, b=2)

    shown = await asyncio.gather(*map(run, [("a", "b"), ("b", "a")]))
    assert shown == ["a: 1\nb: 2", "b: 2\na: 1"]
