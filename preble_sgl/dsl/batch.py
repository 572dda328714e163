"""Running a program over many rows: errors raise inside a row and are data here."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Signature
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar

from preble_sgl.core import Request, Usage
from preble_sgl.dsl.checkpoint import Checkpoint
from preble_sgl.dsl.concurrency import RowLimit
from preble_sgl.dsl.interpreter import CallRecord
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.retry import Retry
from preble_sgl.dsl.tables import as_rows, with_columns
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from preble_sgl.dsl.plan import Plan
    from preble_sgl.dsl.progress import ProgressBar

T = TypeVar("T")
Row = Mapping[str, Any]
Reorder = Literal["rows", "fields"]


class RunOptions(TypedDict, total=False):
    """Options of a run: `seed`, `retry`, `timeout_s` (the run), `call_timeout_s` (each call of it).

    `predictor` says how many output tokens to expect of a request, or None if it does not know; by default
    the profile of the call site does. Runtimes that serve the shortest first go by it.
    """

    seed: int
    retry: Retry
    timeout_s: float
    call_timeout_s: float
    predictor: Callable[[Request], float | None]


class MapOptions(RunOptions, total=False):
    """Options of `map` beyond those of a single run; `Program.amap` says what they mean."""

    plan: "Plan | None"
    concurrency: int | None
    progress: bool
    on_row: "Callable[[RowResult[Any]], None] | None"
    checkpoint: "str | Path | None"
    reorder: Reorder | None
    output_cache: bool
    profile: ProgramProfile | None


@dataclass(frozen=True, slots=True)
class RowResult(Generic[T]):
    """One row's outcome: `value` if `error` is None.

    `num_calls`, `usage`, `calls` and `tools` (name and seconds of each use) count what finished. Of a row
    that failed in a call, `failed_call` is its path and `attempts` how often it was made. A row that a
    checkpoint had is `is_resumed` and has no `calls`.
    """

    index: int
    value: T | None
    error: Exception | None
    num_calls: int
    usage: Usage
    calls: tuple[CallRecord, ...] = ()
    tools: tuple[tuple[str, float], ...] = ()
    failed_call: str | None = None
    attempts: int = 0
    is_resumed: bool = False

    @property
    def ok(self) -> bool:
        """Whether the row finished."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Batch(Sequence[RowResult[T]]):
    """The results of `map`, in the order of the rows. `source`: the table that the rows came from, if any."""

    results: tuple[RowResult[T], ...]
    source: Any = None

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

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

    @property
    def num_duplicates(self) -> int:
        """Calls that were answered from an equal call's answer (`output_cache=True`)."""
        return sum(call.is_duplicate for result in self.results for call in result.calls)

    def table(self) -> Any:
        """Return the table that the rows came from with two columns more: `value` and `error` (texts).

        Raises InputError when the rows were no table.
        """
        if self.source is None:
            raise InputError("the rows of this batch were no table: use `values` or the results")
        errors = [None if r.error is None else f"{type(r.error).__name__}: {r.error}" for r in self.results]
        return with_columns(self.source, {"value": [r.value for r in self.results], "error": errors})


def check_rows(name: str, signature: Signature, rows: Any) -> list[dict[str, Any]]:
    """Return the rows as keyword arguments. Raises InputError for the first row that does not fit."""
    checked = []
    for index, row in enumerate(as_rows(rows)):
        try:
            signature.bind(**row)
        except TypeError as error:
            raise InputError(f"row {index}: {error}; {name}{signature_text(signature)}") from None
        checked.append(row)
    return checked


def signature_text(signature: Signature) -> str:
    """Return the arguments a row must have, as in a definition."""
    return str(signature.replace(return_annotation=Signature.empty))


@dataclass(frozen=True, slots=True)
class RowLoop(Generic[T]):
    """All rows of a batch: `run_row` runs one, `limit` lets them in, the others hear of each that ends."""

    run_row: Callable[[int], Awaitable[RowResult[T]]]
    limit: RowLimit
    checkpoint: Checkpoint | None
    progress: "ProgressBar | None"
    on_row: Callable[[RowResult[T]], None] | None

    async def run(self, order: Sequence[int]) -> tuple[RowResult[T], ...]:
        """Run the rows in this order, and return their results by row."""
        results: dict[int, RowResult[T]] = {}

        async def one(index: int) -> None:
            results[index] = await self._one(index)

        first_error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for index in order:
                    group.create_task(one(index))
        except BaseExceptionGroup as errors:  # not of a row: of `on_row`, or of writing the checkpoint
            first_error = errors.exceptions[0]
        if first_error is not None:
            raise first_error
        return tuple(results[index] for index in range(len(order)))

    async def _one(self, index: int) -> RowResult[T]:
        result = self._resumed(index)
        if result is None:
            async with self.limit:
                result = await self.run_row(index)
            self.limit.on_row(_num_tokens(result.usage), asyncio.get_running_loop().time())
            if self.checkpoint and result.ok:
                result = self._kept(self.checkpoint, result)
        if self.progress:
            self.progress.on_row()
        if self.on_row:
            self.on_row(result)
        return result

    def _kept(self, checkpoint: Checkpoint, result: RowResult[T]) -> RowResult[T]:
        """Write a row down; one that cannot be written and read back fails."""
        try:
            checkpoint.write(result.index, result.value, result.num_calls, result.usage)
        except InputError as error:
            return replace(result, value=None, error=error)
        return result

    def _resumed(self, index: int) -> RowResult[T] | None:
        saved = self.checkpoint.finished.get(index) if self.checkpoint else None
        if saved is None:
            return None
        return RowResult(index, saved.value, None, saved.num_calls, saved.usage, is_resumed=True)


def _num_tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.output_tokens
