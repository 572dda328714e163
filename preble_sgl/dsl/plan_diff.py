"""What a plan said against what a batch did: per line of the program, and per call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from preble_sgl.core import Usage
from preble_sgl.dsl.bounds import Bounds
from preble_sgl.dsl.call_graph import call_graph
from preble_sgl.dsl.interpreter import CallRecord
from preble_sgl.dsl.prefix_counts import new_ranges
from preble_sgl.dsl.tracer import TracedCall
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from preble_sgl.dsl.batch import Batch
    from preble_sgl.dsl.plan import Plan


CACHED = "cached tokens"


@dataclass(frozen=True, slots=True)
class CallDiff:
    """One call: what the likeliest reading said of it (None: it was not in it), and what was served.

    `predicted_cached`: tokens of the prompt that one cache that never forgets would have had.
    """

    path: str
    line: str
    predicted_len: int | None
    predicted_cached: int | None
    served: Usage | None


@dataclass(frozen=True, slots=True)
class Total:
    """One count of the whole batch: what was predicted, and what was served."""

    name: str
    predicted: Bounds
    served: int

    @property
    def is_within(self) -> bool:
        """Whether what was served lies within the bounds."""
        return self.served in self.predicted


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """Predicted against served. Print it; `calls` has every call for a closer look."""

    totals: tuple[Total, ...]
    calls: tuple[CallDiff, ...]
    lines: tuple[tuple[str, Bounds, int, int, int], ...]
    """Per line: its name, calls predicted, calls, prompt tokens and cached tokens served."""

    @property
    def is_within(self) -> bool:
        """Whether all totals lie within what was predicted."""
        return all(total.is_within for total in self.totals)

    def __str__(self) -> str:
        return "\n".join([*_total_lines(self.totals), _table(self.lines)])


def diff(plan: "Plan", batch: "Batch[Any]") -> PlanDiff:
    """Compare. Rows that failed or came from a checkpoint count with the calls that they made here.

    Raises InputError for a batch of other rows.
    """
    if len(batch) != len(plan.traces):
        raise InputError(f"the plan is of {len(plan.traces)} rows, the batch of {len(batch)}")
    served = [call for result in batch.results for call in result.calls]
    bounds, usage = plan.bounds, sum((call.usage for call in served), Usage())
    totals = (
        Total("calls", bounds.calls, len(served)),
        Total("prompt tokens", bounds.prompt_tokens, usage.prompt_tokens),
        Total(CACHED, bounds.reusable_tokens, usage.cached_tokens),
    )
    return PlanDiff(totals, tuple(_calls(plan, served)), tuple(_lines(plan, served)))


def _calls(plan: "Plan", served: Sequence[CallRecord]) -> Iterator[CallDiff]:
    """Pair predicted and served calls by their path."""
    cached = {id(call): new.start for call, new in new_ranges(plan.calls)}
    predicted = {call.request.call_path: call for call in plan.calls}
    for record in served:
        yield _pair(record.path, record.line, predicted.pop(record.path, None), cached, record.usage)
    for path, call in predicted.items():
        yield _pair(path, call.line, call, cached, None)


def _pair(
    path: str, line: str, call: TracedCall | None, cached: dict[int, int], served: Usage | None
) -> CallDiff:
    if call is None:
        return CallDiff(path, line, None, None, served)
    return CallDiff(path, line, len(call.request.prompt), cached[id(call)], served)


def _lines(plan: "Plan", served: Sequence[CallRecord]) -> Iterator[tuple[str, Bounds, int, int, int]]:
    nodes = call_graph(plan).nodes
    for line in dict.fromkeys([*nodes, *(call.line for call in served)]):
        here = [call.usage for call in served if call.line == line]
        usage = sum(here, Usage())
        predicted = nodes[line].calls if line in nodes else Bounds(0, 0.0, 0)
        yield line, predicted, len(here), usage.prompt_tokens, usage.cached_tokens


def _total_lines(totals: Sequence[Total]) -> Iterator[str]:
    for total in totals:
        verdict = "within" if total.is_within else "NOT within"
        few = total.name == CACHED and total.served < total.predicted.lower
        why = (
            " (for one cache that never forgets: several runtimes, or too small ones, have less)"
            if few
            else ""
        )
        yield f"{total.name}: {total.served:,} served, {verdict} the predicted {total.predicted}{why}"


def _table(lines: Sequence[tuple[str, Bounds, int, int, int]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("line", no_wrap=True)
    for name in ("calls predicted", "calls", "prompt tokens", "cached tokens", "hit rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for line, predicted, calls, prompt, cached in lines:
        cells = (str(predicted), f"{calls:,}", f"{prompt:,}", f"{cached:,}", f"{cached / max(1, prompt):.0%}")
        table.add_row(line, *cells)
    out = StringIO()
    Console(file=out, width=140, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
