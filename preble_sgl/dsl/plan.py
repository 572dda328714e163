"""What reading a batch found: its calls, and how much of their prompts they share."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preble_sgl.core import PlanHint, ProgramId, TokenIds, token_ids
from preble_sgl.dsl.bounds import PlanBounds, plan_bounds
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.plan_tree import PlanNode, build_tree
from preble_sgl.dsl.prefix_counts import new_ranges
from preble_sgl.dsl.reorder import Ordering
from preble_sgl.dsl.tracer import Reading, TracedCall

if TYPE_CHECKING:
    from preble_sgl.dsl.batch import Batch
    from preble_sgl.dsl.plan_diff import PlanDiff


class Forecast(Protocol):
    """What is predicted of a plan's placement, as text."""

    def describe(self) -> str:
        """Return one line or more."""
        ...


class Forecaster(Protocol):
    """What can predict where the calls of a plan would run; a `Fleet` can."""

    def predict(self, plan: "Plan") -> Forecast:
        """Return the prediction."""
        ...


@dataclass(frozen=True, repr=False)
class Plan:
    """The calls that a batch will make, read before any of them runs. Advice: programs run as written.

    `warnings`: what could not be read, or is different each time it is read, with its line. `ordering`: the
    order in which rows run, and that of their fields.
    """

    name: str
    traces: tuple[Trace, ...]
    warnings: tuple[str, ...] = ()
    ordering: Ordering = field(default_factory=lambda: Ordering((), ()))

    def __repr__(self) -> str:
        return f"<plan of {self.name}: {len(self.traces)} rows>"

    @cached_property
    def calls(self) -> tuple[TracedCall, ...]:
        """The calls of each row's likeliest reading, row by row in program order."""
        return tuple(call for trace in self.traces for call in trace.calls)

    @cached_property
    def bounds(self) -> PlanBounds:
        """Calls, prompt tokens and reusable tokens: at least, expected, at most. O(n log n)."""
        return plan_bounds(self.traces)

    @property
    def prompt_tokens(self) -> int:
        """Sum of all prompt lengths; generations that reappear in a prompt count as long as expected."""
        return sum(len(call.request.prompt) for call in self.calls)

    @cached_property
    def reusable_tokens(self) -> int:
        """Prompt tokens that need not be computed, with one cache that never forgets. O(n log n)."""
        return self.prompt_tokens - sum(len(new) for _, new in new_ranges(self.calls))

    @property
    def reuse_rate(self) -> float:
        """Reusable share of all prompt tokens, 0 to 1."""
        return self.reusable_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def is_static(self) -> bool:
        """Whether the calls are the same whatever is generated."""
        return all(len(trace.readings) == 1 and not trace.is_open for trace in self.traces)

    def hint(self, row: int, program_id: ProgramId) -> PlanHint:
        """Return what the scheduler should know of one row's run: its KV at its widest, and its prefix."""
        trace = self.traces[row]
        prefix = max(
            (_known_beginning(call) for call in trace.readings[0].calls), key=len, default=token_ids()
        )
        widest = max(_kv_len(reading) for reading in trace.readings)
        return PlanHint(program_id=program_id, kv_tokens=widest, prefixes=(prefix,) if prefix else ())

    def tree(self) -> PlanNode:
        """Return the prefix tree by place in the program text: one node per line and role, not per row."""
        return build_tree(self.name, self.traces)

    def explain(self, fleet: Forecaster | None = None) -> str:
        """Return the plan as text: totals, the shared-prefix tree, what could not be read, what to reorder.

        With `fleet`, also where its policy would place the calls, and what is left of the reuse then.
        """
        from preble_sgl.dsl.explain import explain

        text = explain(self)
        return text if fleet is None else f"{text}\n{fleet.predict(self).describe()}"

    def lint(self) -> tuple[str, ...]:
        """Return the lines where sharing ends early, each with what moving a text would gain."""
        from preble_sgl.dsl.lint import lint

        return lint(self)

    def html(self, path: str | Path) -> Path:
        """Write the plan as one page that needs nothing else: prefix tree, call graph, table."""
        from preble_sgl.dsl.plan_page import page

        Path(path).write_text(page(self), encoding="utf-8")
        return Path(path)

    def mermaid(self) -> str:
        """Return the call graph as a Mermaid diagram: one node per line of the program."""
        from preble_sgl.dsl.call_graph import mermaid

        return mermaid(self)

    def diff(self, batch: "Batch[Any]") -> "PlanDiff":
        """Compare with what a batch did, call by call. Raises InputError for a batch of other rows."""
        from preble_sgl.dsl.plan_diff import diff

        return diff(self, batch)


def _kv_len(reading: Reading) -> int:
    """Return the KV tokens that a run holds at its widest."""
    computed = sum(len(new) for _, new in new_ranges(reading.calls))
    return computed + sum(len(call.output) for call in reading.calls)


def _known_beginning(call: TracedCall) -> TokenIds:
    """Return a prompt up to the first token that is not generated yet."""
    prompt = call.request.prompt
    first = prompt.tobytes()[3::4].find(b"\xff")
    return prompt if first < 0 else prompt[:first]
