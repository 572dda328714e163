"""A plan as text."""

from collections.abc import Iterator
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from preble_sgl.dsl.plan import Plan, PlanNode


def explain(plan: Plan) -> str:
    """Return totals, the shared-prefix tree and what could not be read."""
    reusable = plan.reusable_tokens
    reuse = f"reusable {reusable:,} ({plan.reuse_rate:.0%})"
    lines = [
        f"{plan.name} · {len(plan.traces):,} rows · {len(plan.calls):,} calls",
        f"prompt tokens {plan.prompt_tokens:,} · {reuse} · to compute {plan.prompt_tokens - reusable:,}",
        _tree(plan.tree()),
        *_stops(plan),
    ]
    return "\n".join(lines)


def _tree(root: PlanNode) -> str:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("shared-prefix tree", no_wrap=True)
    for name in ("mean len", "texts", "calls", "tokens", "reused"):
        table.add_column(name, justify="right")
    for indent, node in _walk(root, 0):
        reused = f"{node.tokens - node.new_tokens:,}"
        cells = (f"{node.mean_len:,.0f}", f"{node.texts:,}", f"{node.calls:,}", f"{node.tokens:,}", reused)
        table.add_row("  " * indent + node.label, *cells)
    out = StringIO()
    Console(file=out, width=120, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def _walk(node: PlanNode, depth: int) -> Iterator[tuple[int, PlanNode]]:
    """Yield nodes in program order; only a branching of the tree indents."""
    for child in node.children.values():
        yield depth, child
        yield from _walk(child, depth + (len(child.children) > 1))


def _stops(plan: Plan) -> Iterator[str]:
    stopped: dict[str, int] = {}
    for trace in plan.traces:
        if trace.stopped_at:
            stopped[trace.stopped_at] = stopped.get(trace.stopped_at, 0) + 1
    for place, rows in stopped.items():
        yield f"read only up to {place} ({rows:,} rows)"
