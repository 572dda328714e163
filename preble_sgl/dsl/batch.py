"""Running a program over many rows: errors raise inside a row and are data here."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from preble_sgl.core import Usage
from preble_sgl.errors import InputError

T = TypeVar("T")
Row = Mapping[str, Any]
OnCall = Callable[[Usage], None]


@dataclass(frozen=True, slots=True)
class RowResult(Generic[T]):
    """One row's outcome: `value` if `error` is None. `num_calls` and `usage` count finished calls only."""

    index: int
    value: T | None
    error: Exception | None
    num_calls: int
    usage: Usage

    @property
    def ok(self) -> bool:
        """Whether the row finished."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Batch(Sequence[RowResult[T]]):
    """The results of `map`, in the order of the rows."""

    results: tuple[RowResult[T], ...]

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[RowResult[T]]:
        return iter(self.results)

    @property
    def values(self) -> list[T]:
        """The values of all rows. Raises the first row's error if there is one."""
        for result in self.results:
            if result.error is not None:
                raise result.error
        return [result.value for result in self.results]  # type: ignore[misc]

    @property
    def errors(self) -> list[RowResult[T]]:
        """The rows that failed."""
        return [result for result in self.results if not result.ok]

    @property
    def usage(self) -> Usage:
        """Token counts over all rows."""
        return sum((result.usage for result in self.results), Usage())


def check_rows(name: str, signature: Signature, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the rows as keyword arguments. Raises InputError for the first row that does not fit."""
    checked = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {index}: {name} takes rows of named arguments, not {type(row).__name__}")
        try:
            signature.bind(**row)
        except TypeError as error:
            raise InputError(f"row {index}: {error}; {name}{signature_text(signature)}") from None
        checked.append(dict(row))
    return checked


def signature_text(signature: Signature) -> str:
    """Return the arguments a row must have, as in a definition."""
    return str(signature.replace(return_annotation=Signature.empty))


async def run_rows(
    run_row: Callable[[int, OnCall], Awaitable[RowResult[T]]],
    num_rows: int,
    *,
    concurrency: int,
    progress: "ProgressBar | None",
    on_row: Callable[[RowResult[T]], None] | None,
) -> Batch[T]:
    """Run all rows, at most `concurrency` at a time, and tell `on_row` of each as it finishes."""
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int) -> RowResult[T]:
        async with gate:
            result = await run_row(index, progress.on_call if progress else lambda usage: None)
        if progress:
            progress.on_row()
        if on_row:
            on_row(result)
        return result

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index)) for index in range(num_rows)]
    return Batch(tuple(task.result() for task in tasks))


class ProgressBar:
    """Rows, calls, cached share of the prompts, and time left."""

    def __init__(self, name: str, num_rows: int) -> None:
        self._usage = Usage()
        self._num_calls = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        calls = TextColumn("{task.fields[calls]} calls · {task.fields[cached]:.0%} cached")
        self._progress = Progress(*columns, calls, TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._progress.add_task(name, total=num_rows, calls=0, cached=0.0)

    @classmethod
    @contextmanager
    def shown(cls, name: str, num_rows: int) -> "Iterator[ProgressBar]":
        """Show a bar on standard error for as long as the context lasts."""
        bar = cls(name, num_rows)
        with bar._progress:
            yield bar

    def on_call(self, usage: Usage) -> None:
        """Count a finished call."""
        self._num_calls += 1
        self._usage += usage
        cached = self._usage.cached_tokens / max(1, self._usage.prompt_tokens)
        self._progress.update(self._task, calls=self._num_calls, cached=cached)

    def on_row(self) -> None:
        """Count a finished row."""
        self._progress.advance(self._task)
