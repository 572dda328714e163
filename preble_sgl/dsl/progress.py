"""A bar on standard error while a batch runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from preble_sgl.core import Usage
from preble_sgl.dsl.interpreter import CallRecord

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar:
    """Rows, calls, cached share of the prompts, tokens per second, and time left."""

    def __init__(self, progress: "Progress", name: str, num_rows: int) -> None:
        self._progress = progress
        self._usage = Usage()
        self._num_calls = 0
        self._started_at = time.monotonic()
        self._task = progress.add_task(name, total=num_rows, calls=0, cached=0.0, rate=0.0)

    @classmethod
    @contextmanager
    def shown(cls, name: str, num_rows: int) -> "Iterator[ProgressBar]":
        """Show a bar on standard error for as long as the context lasts."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        counts = (
            "{task.fields[calls]:,} calls · {task.fields[cached]:.0%} cached · {task.fields[rate]:,.0f} tok/s"
        )
        console = Console(stderr=True)
        with Progress(*columns, TextColumn(counts), TimeRemainingColumn(), console=console) as progress:
            yield cls(progress, name, num_rows)

    def on_call(self, call: CallRecord) -> None:
        """Count a finished call."""
        self._num_calls += 1
        self._usage += call.usage
        cached = self._usage.cached_tokens / max(1, self._usage.prompt_tokens)
        tokens = self._usage.prompt_tokens + self._usage.output_tokens
        rate = tokens / max(1e-9, time.monotonic() - self._started_at)
        self._progress.update(self._task, calls=self._num_calls, cached=cached, rate=rate)

    def on_row(self) -> None:
        """Count a finished row."""
        self._progress.advance(self._task)
