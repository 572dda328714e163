"""A plan as text."""

from collections import Counter
from collections.abc import Iterator
from io import StringIO
from typing import TYPE_CHECKING

from preble_sgl.dsl.plan_tree import PlanNode

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan


def explain(plan: "Plan") -> str:
    """Return totals, the shared-prefix tree, what could not be read, and what could be shared better."""
    return "\n".join([*_totals(plan), _tree(plan.tree()), *stops(plan), *plan.warnings, *plan.lint()])


def _totals(plan: "Plan") -> Iterator[str]:
    """Say how much there is: exact numbers, or at least, expected and at most."""
    bounds = plan.bounds
    yield f"{plan.name} · {len(plan.traces):,} rows · {bounds.calls} calls"
    if plan.is_static:
        reusable = plan.reusable_tokens
        reuse = f"reusable {reusable:,} ({plan.reuse_rate:.0%})"
        yield f"prompt tokens {plan.prompt_tokens:,} · {reuse} · to compute {plan.prompt_tokens - reusable:,}"
    else:
        rate = bounds.reusable_tokens.expected / max(1.0, bounds.prompt_tokens.expected)
        yield f"prompt tokens {bounds.prompt_tokens} · reusable {bounds.reusable_tokens} ({rate:.0%})"
        yield "at least – expected – at most; what depends on generated text was read with every answer"


def _tree(root: PlanNode) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("shared-prefix tree", no_wrap=True)
    for name in ("mean len", "texts", "calls", "tokens", "reused"):
        table.add_column(name, justify="right", no_wrap=True)
    for indent, node in walk(root, 0):
        numbers = (f"{node.tokens:,.0f}", f"{node.reused_tokens:,.0f}")
        cells = (f"{node.mean_len:,.0f}", f"{node.texts:,}", str(node.num_calls), *numbers)
        table.add_row("  " * indent + node.label, *cells)
    out = StringIO()
    Console(file=out, width=140, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def walk(node: PlanNode, depth: int) -> Iterator[tuple[int, PlanNode]]:
    """Yield nodes in program order; only a branching of the tree indents."""
    for child in node.children.values():
        yield depth, child
        yield from walk(child, depth + (len(child.children) > 1))


def stops(plan: "Plan") -> Iterator[str]:
    """Name the lines at which reading ended early."""
    stops = Counter(
        place
        for trace in plan.traces
        for place in {reading.stopped_at for reading in trace.readings if reading.stopped_at}
    )
    for place, rows in stops.items():
        yield f"read only up to {place} ({rows:,} rows)"
    capped = sum(not trace.is_complete for trace in plan.traces)
    if capped:
        yield f"{capped:,} rows can go more ways than were read: no upper bound"
