"""The orders in which the rows of a table run, and the fields in each row, so that neighbours share prefixes.

A prompt made from a row begins with its first fields. Rows that run one after the other and have the same
first fields share that prefix in the KV cache. There are two ways to get there.

`order_rows` keeps the order of fields and sorts the rows by their values. For a fixed order of fields no
order of rows hits more: rows that agree in their first fields stand together.

`order_fields` gives every row its own order of fields, by Greedy Group Recursion (GGR), Algorithm 1 of
"Optimizing LLM Queries in Relational Data Analytics Workloads", https://arxiv.org/abs/2403.05821:

1. Put first the fields in which all rows agree.
2. Of all values of the other fields take the one whose rows, run together, save most: (rows - 1) × length,
   where the length includes the fields that depend on it (one value here always comes with one there).
3. Its rows begin with that field and its dependents. Go on with their other fields in the same way.
4. Take the next value among the rows that are left, until no value comes twice.
5. What is then left, and what lies deeper than MAX_DEPTH, orders its fields by statistics: those first whose
   repeated values are longest in sum.

It departs from the paper in these points. Lengths count once, not squared, as the goal is tokens that need
not be computed. Dependencies are read from the data, and hold in one direction. Dependents come first: they
repeat more often, so that products of one category share it. A heap finds the best value without another
look at the table, so that only the depth in fields needs a limit. The rows are sorted at the end, which joins
groups that begin alike. And the order of fields as given, and that by statistics, compete with the outcome,
so that it never is worse than they are.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

from preble_sgl.errors import InputError

MAX_DEPTH = 8
"""How many times GGR divides the rows of a group again. It bounds the time for tables with many fields."""

Rows = Sequence[Mapping[str, str]]
Length = Callable[[str], int]

field_order: ContextVar[tuple[str, ...] | None] = ContextVar("field_order", default=None)
"""The order of fields of the row being run; None for the order in which they are written."""


@dataclass(frozen=True, slots=True)
class Ordering:
    """An order for a table.

    `rows` are the indices of the rows as they should run; `fields[i]` is the order of the fields of row `i`
    of the table as it was given.
    """

    rows: tuple[int, ...]
    fields: tuple[tuple[str, ...], ...]


# What a program uses


@contextmanager
def ordered_fields(order: tuple[str, ...] | None) -> Iterator[None]:
    """Let `fields` use this order inside the context."""
    token = field_order.set(order)
    try:
        yield
    finally:
        field_order.reset(token)


def fields(**values: object) -> str:
    """Render one line `name: value` per argument, in the order of fields of the row being run.

    Without such an order, the lines come as the arguments do. Names that the order lacks come last.
    """
    order = field_order.get() or ()
    names = [name for name in order if name in values]
    names += [name for name in values if name not in order]
    return "\n".join(f"{name}: {values[name]}" for name in names)


# Orders


def prefix_hits(rows: Rows, ordering: Ordering, *, length: Length = len) -> int:
    """Return how much of the rows the row before has computed already.

    That is the sum, over all rows but the first, of the lengths of the leading (field, value) pairs that a
    row has in common with the one before it, in the unit of `length`. Only equal values count, and field
    names and separators count nothing. The paper's prefix hit count is the same sum over squared lengths.
    A cache that holds more than one row may hit more, unless the rows are sorted as they are here.
    Raises InputError if the ordering is of another number of rows.
    """
    if not len(rows) == len(ordering.rows) == len(ordering.fields):
        raise InputError(f"the ordering is of {len(ordering.rows)} rows, but there are {len(rows)}")
    length_of = cache(length)
    total = 0
    for before, after in pairwise(ordering.rows):
        for name, other in zip(ordering.fields[after], ordering.fields[before], strict=True):
            if name != other or rows[after][name] != rows[before][name]:
                break
            total += length_of(rows[after][name])
    return total


def order_rows(rows: Rows, *, fields: Sequence[str] | None = None) -> Ordering:
    """Return the order of rows with most prefix hits for one order of fields, by default the first row's.

    Sorted rows are best whatever the lengths are, so none are asked for. Takes O(n log n) comparisons of
    rows. Raises InputError if rows have different fields, or if `fields` does not name each of them once.
    """
    names = _names(rows)
    order = names if fields is None else tuple(fields)
    if rows and sorted(order) != sorted(names):
        raise InputError(f"fields={order}: name each field of the rows once: {', '.join(names)}")
    return _sorted_rows(rows, [order] * len(rows))


def order_fields(rows: Rows, *, length: Length = len) -> Ordering:
    """Return an order of rows, and of the fields in each row, with many prefix hits.

    Never has fewer than `order_rows` of the same rows; where nothing is gained, fields keep their order.
    `length` is asked once per text. Takes O(n m log n) for n rows of m fields at each of at most MAX_DEPTH
    levels, and at worst O(n m²) to find what depends on what. Raises InputError if rows have different
    fields.
    """
    names = _names(rows)
    texts = dict.fromkeys(text for row in rows for text in row.values())
    lengths = {text: length(text) for text in texts}
    table = _Table.of(rows, names, lengths)
    as_given = range(len(names))
    by_statistics = table.ranked({field: Counter(column) for field, column in enumerate(table.columns)})
    by_groups: list[list[int]] = [[] for _ in rows]
    _arrange(table, range(len(rows)), as_given, by_groups, depth=0)
    candidates = (
        _sorted_rows(rows, [tuple(names[field] for field in order) for order in orders])
        for orders in ([as_given] * len(rows), [by_statistics] * len(rows), by_groups)
    )
    return max(candidates, key=lambda ordering: prefix_hits(rows, ordering, length=lengths.__getitem__))


def _names(rows: Rows) -> tuple[str, ...]:
    """Return the fields that all rows have."""
    names = tuple(rows[0]) if rows else ()
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise InputError(
                f"row {index} has the fields {', '.join(row)}, but row 0 has {', '.join(names)}: "
                "give all rows the same fields"
            )
    return names


def _sorted_rows(rows: Rows, orders: Sequence[tuple[str, ...]]) -> Ordering:
    def pairs(index: int) -> list[tuple[str, str]]:
        return [(name, rows[index][name]) for name in orders[index]]

    return Ordering(tuple(sorted(range(len(rows)), key=pairs)), tuple(orders))


# Greedy Group Recursion


@dataclass(frozen=True, slots=True)
class _Table:
    """A table with numbers for fields and values.

    `columns[f][i]`: the number of the value of field `f` in row `i`; `lengths[f]`: by that number.
    `blocks[f]`: the field `f` and those that depend on it, those with fewest values first.
    """

    columns: tuple[list[int], ...]
    lengths: tuple[list[int], ...]
    blocks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rows: Rows, names: Sequence[str], lengths: Mapping[str, int]) -> "_Table":
        texts = [sorted({row[name] for row in rows}) for name in names]
        numbers = [{text: number for number, text in enumerate(known)} for known in texts]
        columns = tuple(
            [known[row[name]] for row in rows] for name, known in zip(names, numbers, strict=True)
        )
        return cls(
            columns=columns,
            lengths=tuple([lengths[text] for text in known] for known in texts),
            blocks=_blocks(columns, [len(known) for known in texts]),
        )

    def block(self, field: int, among: Container[int]) -> list[int]:
        """Return the block of a field without what is not in `among`."""
        return [member for member in self.blocks[field] if member in among]

    def weight(self, block: Iterable[int], row: int) -> int:
        """Return the length of these fields in a row."""
        return sum(self.lengths[field][self.columns[field][row]] for field in block)

    def count(self, field: int, rows: Iterable[int]) -> Counter[int]:
        """Count the values of a field in these rows."""
        return Counter(map(self.columns[field].__getitem__, rows))

    def ranked(self, counts: Mapping[int, Counter[int]]) -> list[int]:
        """Return the fields of the counts, those first whose repeated values are longest in sum."""

        def expected(field: int) -> int:
            lengths = self.lengths[field]
            return sum((count - 1) * lengths[value] for value, count in counts[field].items())

        best_first = sorted(counts, key=lambda field: (-expected(field), field))
        return list(dict.fromkeys(member for field in best_first for member in self.block(field, counts)))


def _blocks(columns: Sequence[list[int]], num_values: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return, by field, the field and those that depend on it, those with fewest values first."""
    fewest_first = sorted(range(len(columns)), key=lambda field: (num_values[field], field))

    def together(field: int, other: int) -> bool:
        if field == other:
            return True
        # What never repeats determines everything, and saves nothing.
        repeats = num_values[field] < len(columns[field])
        return (
            repeats and num_values[other] <= num_values[field] and _determines(columns[field], columns[other])
        )

    return tuple(
        tuple(other for other in fewest_first if together(field, other)) for field in range(len(columns))
    )


def _determines(column: Iterable[int], other: Iterable[int]) -> bool:
    """Say whether equal values in one column always come with equal values in the other."""
    partner: dict[int, int] = {}
    return all(
        partner.setdefault(value, theirs) == theirs for value, theirs in zip(column, other, strict=True)
    )


def _arrange(
    table: _Table, rows: Sequence[int], fields: Iterable[int], orders: list[list[int]], depth: int
) -> None:
    """Append these fields to the order of each of these rows, which agree in the fields they already have."""
    counts = {field: table.count(field, rows) for field in fields}
    agreed = [field for field in counts if len(counts[field]) == 1]
    _append(orders, rows, agreed)
    for field in agreed:
        del counts[field]
    ranked = table.ranked(counts)
    left = dict.fromkeys(rows)
    if depth < MAX_DEPTH:
        for block, group in _groups(table, left, counts):
            _append(orders, group, block)
            others = [field for field in counts if field not in block]
            _arrange(table, group, others, orders, depth + 1)
    _append(orders, left, ranked)


def _append(orders: list[list[int]], rows: Iterable[int], fields: Sequence[int]) -> None:
    for row in rows:
        orders[row] += fields


def _groups(
    table: _Table, left: dict[int, None], counts: Mapping[int, Counter[int]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield what a group begins with, and its rows: the group that saves most first. Its rows leave `left`.

    `counts` are those of the values in the rows left, and follow them. As rows go, savings only fall: one
    that has fallen since it was put on the heap is put back when it comes up.
    """
    blocks = {field: table.block(field, counts) for field in counts}
    members = _members(table, left, counts)
    weights = {key: table.weight(blocks[key[0]], rows[0]) for key, rows in members.items()}
    heap = [(-(len(rows) - 1) * weights[key], key) for key, rows in members.items()]
    heapify(heap)
    while heap:
        stated, (field, value) = heappop(heap)
        saving = (counts[field][value] - 1) * weights[field, value]
        if saving <= 0:
            continue
        if saving < -stated:
            heappush(heap, (-saving, (field, value)))
            continue
        group = [row for row in members[field, value] if row in left]
        for row in group:
            del left[row]
        for other, count in counts.items():
            count.subtract(table.count(other, group))
        yield blocks[field], group


def _members(
    table: _Table, rows: Iterable[int], counts: Mapping[int, Counter[int]]
) -> dict[tuple[int, int], list[int]]:
    """Return the rows that have each repeated value, by field and value."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for field, count in counts.items():
        column = table.columns[field]
        for row in rows:
            if count[column[row]] > 1:
                members[field, column[row]].append(row)
    return members
