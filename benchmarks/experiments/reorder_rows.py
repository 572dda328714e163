"""What a table's prompts share, by the order of rows and fields, and how long it takes to find the order.

    python -m benchmarks.experiments.reorder_rows [--num-rows 10000] [--rounds 3] [--seed 0] [--out FILE]

The tables are synthetic, in the shapes of those in https://arxiv.org/abs/2403.05821: the same names of fields
where the paper gives them, entities with Zipf popularity joined with texts of their own, rows in random
order. Texts are made of invented words, so that a word stands for about a token. No model runs: a hit is a
leading value that a row shares with the row before, as `prefix_hits` counts it, over all values of the table.
Orders are sought by characters, and judged by characters and by words. Seconds are of one core, the median of
the rounds, in which the tables take turns.
"""

import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rows import write_rows
from preble_sgl.dsl.reorder import Ordering, order_fields, order_rows, prefix_hits

RESULT = Path("benchmarks/results/reorder_rows")
LARGE = 3
"""The products come once more with so many times the rows; the paper's largest table has 28,479."""

T = TypeVar("T")
Rows = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One order of one table. Hit rates are shares of the values' characters and words."""

    table: str
    num_rows: int
    num_fields: int
    order: str
    hit_rate: float
    word_hit_rate: float
    solver_s: float
    solver_min_s: float
    solver_max_s: float


# Tables


class Source:
    """Where the values of a table come from."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self._words = ["".join(self.rng.choices(syllables, k=self.rng.randint(1, 4))) for _ in range(5000)]

    def text(self, mean_words: int) -> str:
        """Return a text of between half and one and a half times so many words."""
        return " ".join(
            self.rng.choices(self._words, k=self.rng.randint(mean_words // 2 + 1, mean_words * 3 // 2))
        )

    def code(self) -> str:
        """Return an identifier."""
        return f"{self.rng.getrandbits(40):010X}"

    def popular(self, entities: Sequence[T], num: int) -> list[T]:
        """Draw so many of the entities, the i-th with a weight of 1/i."""
        weights = list(accumulate(1 / rank for rank in range(1, len(entities) + 1)))
        return self.rng.choices(entities, cum_weights=weights, k=num)

    def some(self, *choices: str) -> str:
        """Return one of the texts."""
        return self.rng.choice(choices)


def movies(source: Source, num_rows: int) -> Rows:
    """Reviews joined with their movies."""
    genres = [source.text(3) for _ in range(40)]
    companies = [source.text(2) for _ in range(80)]
    catalogue = [
        {
            "genres": source.rng.choice(genres),
            "movieinfo": source.text(90),
            "movietitle": source.text(3),
            "productioncompany": source.rng.choice(companies),
            "rottentomatoeslink": f"m/{source.code()}",
        }
        for _ in range(num_rows // 15)
    ]
    names = (
        "genres movieinfo movietitle productioncompany reviewcontent reviewtype rottentomatoeslink topcritic"
    )
    return [
        _in_order(
            names,
            movie,
            {
                "reviewcontent": source.text(25),
                "reviewtype": source.some("Fresh", "Rotten"),
                "topcritic": source.some("True", "False"),
            },
        )
        for movie in source.popular(catalogue, num_rows)
    ]


def products(source: Source, num_rows: int) -> Rows:
    """Reviews joined with their products."""
    catalogue = [
        {"description": source.text(150), "parent_asin": source.code(), "product_title": source.text(15)}
        for _ in range(num_rows // 10)
    ]
    return [
        _in_order(
            "description id parent_asin product_title rating review_title text verified_purchase",
            product,
            {
                "id": source.code(),
                "rating": source.some("1.0", "2.0", "3.0", "4.0", "5.0"),
                "review_title": source.text(4),
                "text": source.text(40),
                "verified_purchase": source.some("True", "False"),
            },
        )
        for product in source.popular(catalogue, num_rows)
    ]


def posts(source: Source, num_rows: int) -> Rows:
    """Comments joined with the posts that they are on."""
    threads = [
        {"Body": source.text(300), "PostDate": f"2010-07-{day % 28 + 1:02}", "PostId": source.code()}
        for day in range(num_rows // 8)
    ]
    return [
        _in_order("Body PostDate PostId Text", thread, {"Text": source.text(40)})
        for thread in source.popular(threads, num_rows)
    ]


def beers(source: Source, num_rows: int) -> Rows:
    """Scores joined with beers and drinkers: short values, and two keys that know nothing of each other."""
    styles = [source.text(3) for _ in range(60)]
    cellar = [
        {"beer/beerId": source.code(), "beer/name": source.text(4), "beer/style": source.rng.choice(styles)}
        for _ in range(num_rows // 20)
    ]
    drinkers = source.popular([source.text(2) for _ in range(num_rows // 10)], num_rows)
    scores = ("review/appearance", "review/overall", "review/palate", "review/taste")
    return [
        beer
        | {score: f"{source.rng.randint(1, 10)}/10" for score in scores}
        | {"review/profileName": drinker}
        for beer, drinker in zip(source.popular(cellar, num_rows), drinkers, strict=True)
    ]


def claims(source: Source, num_rows: int) -> Rows:
    """Claims with the four passages found for each, which claims on the same subject share, in any order."""
    subjects = [[source.text(200) for _ in range(6)] for _ in range(num_rows // 20)]
    return [
        {"claim": source.text(10)}
        | {f"evidence{i}": passage for i, passage in enumerate(source.rng.sample(passages, 4), 1)}
        for passages in source.popular(subjects, num_rows)
    ]


def scores(source: Source, num_rows: int) -> Rows:
    """Sheet music with 57 fields: own texts, facts of the composer, flags and classes."""
    composers = [{f"composer{i}": source.text(6) for i in range(10)} for _ in range(num_rows // 20)]
    classes = {f"class{i}": [source.text(2) for _ in range(4 + i)] for i in range(20)}
    return [
        {f"own{i}": source.text(20) for i in range(10)}
        | composer
        | {f"flag{i}": source.some("True", "False") for i in range(17)}
        | {name: source.rng.choice(values) for name, values in classes.items()}
        for composer in source.popular(composers, num_rows)
    ]


def _in_order(names: str, *parts: Mapping[str, str]) -> dict[str, str]:
    row = {name: value for part in parts for name, value in part.items()}
    return {name: row[name] for name in names.split()}


TABLES = {make.__name__: make for make in (movies, products, posts, beers, claims, scores)}


# Measuring


def words(text: str) -> int:
    """Return the number of words."""
    return len(text.split())


def given(rows: Rows) -> Ordering:
    """Return the order that the table has."""
    return Ordering(tuple(range(len(rows))), (tuple(rows[0]),) * len(rows))


ORDERS = (given, order_rows, order_fields)


def measure(num_rows: int, rounds: int, seed: int) -> list[Outcome]:
    """Return an outcome for each order of each table."""
    tables = {name: make(Source(seed), num_rows) for name, make in TABLES.items()}
    tables["products, large"] = products(Source(seed), LARGE * num_rows)
    todo = [(name, order) for name in tables for order in ORDERS]
    seconds: dict[tuple[str, str], list[float]] = {(name, order.__name__): [] for name, order in todo}
    for _ in range(rounds):
        for name, order in todo:
            seconds[name, order.__name__].append(timed(order, tables[name]))
    return [outcome(name, tables[name], order, seconds[name, order.__name__]) for name, order in todo]


def timed(order: Callable[[Rows], Ordering], rows: Rows) -> float:
    """Return the seconds that ordering takes."""
    started_at = perf_counter()
    order(rows)
    return perf_counter() - started_at


def outcome(name: str, rows: Rows, order: Callable[[Rows], Ordering], seconds: Sequence[float]) -> Outcome:
    """Return what an order of a table saves, and what it took."""
    ordering = order(rows)

    def hit_rate(length: Callable[[str], int]) -> float:
        total = sum(length(text) for row in rows for text in row.values())
        return round(prefix_hits(rows, ordering, length=length) / total, 4)

    return Outcome(
        table=name,
        num_rows=len(rows),
        num_fields=len(rows[0]),
        order=order.__name__,
        hit_rate=hit_rate(len),
        word_hit_rate=hit_rate(words),
        solver_s=round(median(seconds), 3),
        solver_min_s=round(min(seconds), 3),
        solver_max_s=round(max(seconds), 3),
    )


# Showing it


def shown(outcomes: Sequence[Outcome]) -> Table:
    """Return the outcomes as a table."""
    table = Table(title="Synthetic tables: what a row shares with the row before")
    for column in ("table", "rows × fields", "order", "hit rate", "of words", "solver s (median, range)"):
        table.add_column(column)
    for row in outcomes:
        solver = f"{row.solver_s:.2f} ({row.solver_min_s:.2f}–{row.solver_max_s:.2f})"
        size = f"{row.num_rows:,} × {row.num_fields}"
        table.add_row(row.table, size, row.order, f"{row.hit_rate:.1%}", f"{row.word_hit_rate:.1%}", solver)
    return table


def main(
    num_rows: Annotated[int, typer.Option(min=100, help="Rows of each table.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    outcomes = measure(num_rows, rounds, seed)
    Console(width=110).print(shown(outcomes))
    about = {
        "label": "synthetic tables, no model; hit rates are counted, seconds are measured",
        "command": f"python -m benchmarks.experiments.reorder_rows --num-rows {num_rows}"
        f" --rounds {rounds} --seed {seed}",
        "machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
        "num_rows": num_rows,
        "rounds": rounds,
        "seed": seed,
    }
    write_rows(out.with_suffix(".json"), about, Outcome, map(astuple, outcomes))
    print(orjson.dumps(about | {"rows": [asdict(row) for row in outcomes]}).decode())


if __name__ == "__main__":
    typer.run(main)
