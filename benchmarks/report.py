"""Fills the tables of docs/results-simulated.md from the files in benchmarks/results.

    python -m benchmarks.report [--results benchmarks/results] [--document docs/results-simulated.md]

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; the names are those of `tables.TABLES`.
What lies between markers of other names is left as it is. A test fails when the document is not up to date.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tables import TABLES
from preble_sgl.errors import InputError

DOCUMENT = Path("docs/results-simulated.md")
RESULTS = Path("benchmarks/results")


def render(document: str, results: Path) -> str:
    """Return the document with every table made anew.

    Raises InputError if a result file is missing, or if the markers of a table are missing or there twice.
    """
    for name, table in TABLES.items():
        document = _fill(document, name, table(results))
    return document


def _fill(document: str, name: str, text: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise InputError(f"the document needs {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = RESULTS,
    document: Annotated[Path, typer.Option(help="The document to fill.")] = DOCUMENT,
) -> None:
    """Fill the tables."""
    before = document.read_text()
    after = render(before, results)
    document.write_text(after)
    print(f"{document}: {len(TABLES)} tables, {'changed' if after != before else 'as they were'}")


if __name__ == "__main__":
    typer.run(main)
