"""Where a program's prompts stop being shared too early, and what putting a text elsewhere would gain.

Prompts share a beginning. A text that is the same for all rows but stands behind one that differs is computed
once per row. The lint finds such texts in the prefix tree and names both lines; it never moves anything,
since an order of texts is part of what a program says.
"""

import ast
import inspect
import textwrap
from array import array
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preble_sgl.core import common_prefix_len
from preble_sgl.dsl.plan_tree import PlanNode

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan

LEAST_GAIN = 64
"""Tokens per row below which nothing is said."""

_OF_THE_TEMPLATE = ("gen ", "output ", "choice ")

_UNSTEADY: dict[str, set[str] | None] = {
    "random": None,
    "secrets": None,
    "uuid": {"uuid1", "uuid4"},
    "time": {"time", "time_ns", "strftime", "localtime", "gmtime", "ctime", "asctime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "os": {"urandom"},
}
"""Names whose use makes a program different each time: the module or class, and which of its functions."""


def lint(plan: "Plan") -> tuple[str, ...]:
    """Return one line of advice per text that could be shared and is not."""
    found: dict[str, None] = {}
    for node in plan.tree().children.values():
        for advice in _below(node, None):
            found.setdefault(advice)
    return tuple(found)


def _below(node: PlanNode, differing: PlanNode | None) -> Iterator[str]:
    """Walk down, remembering the first text on the way that differs from row to row."""
    if node.kind == "argument" and node.texts > 1:
        differing = differing or node
        yield from _late_beginning(node)
    elif node.kind == "constant" and differing is not None:
        yield from _late_text(differing, node)
    for child in node.children.values():
        yield from _below(child, differing)


def _late_text(differing: PlanNode, node: PlanNode) -> Iterator[str]:
    """Tell of a text that is always the same and stands behind one that is not."""
    if node.mean_len >= LEAST_GAIN and node.texts > 1 and not node.label.startswith(_OF_THE_TEMPLATE):
        yield (
            f"{line_of(differing)} differs from row to row and stands before {node.mean_len:,.0f} tokens of "
            f"{line_of(node)} that do not: if those came first, {_gain(node, node.mean_len)}"
        )


def _late_beginning(node: PlanNode) -> Iterator[str]:
    """Tell of a text whose beginning differs, but not its end."""
    one, other = (node.samples[i] for i in (0, 1))
    shared = common_prefix_len(one, other)
    same = min(common_suffix_len(one, other), len(one) // 4 - shared)
    if same >= LEAST_GAIN and same > shared:
        yield (
            f"{line_of(node)}: what differs from row to row stands before {same:,} tokens of the same text "
            f"that do not: if it came last, {_gain(node, same)}"
        )


def _gain(node: PlanNode, length: float) -> str:
    return f"{length * (node.texts - 1):,.0f} tokens less would be computed"


def common_suffix_len(a: bytes, b: bytes) -> int:
    """Return how many tokens two packed texts have in common at their ends. O(answer)."""
    backwards = zip(array("i", a)[::-1], array("i", b)[::-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))


def line_of(node: PlanNode) -> str:
    """Return the `file:line` of a place."""
    return node.label.split()[-1]


def unsteady_lines(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the lines of a function's own source that use the clock or chance, with what they use."""
    try:
        source, first = inspect.getsourcelines(fn)
        file = Path(inspect.getfile(fn)).name
    except (OSError, TypeError):
        return ()
    tree = ast.parse(textwrap.dedent("".join(source)))
    uses = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return tuple(
        f"{file}:{first + node.lineno - 1}: uses {ast.unparse(node.func)}: prompts may be different each time"
        for node in uses
        if _is_unsteady(node)
    )


def _is_unsteady(call: ast.Call) -> bool:
    """Return whether a call such as `datetime.now()` or `random.choice(x)` is one of those.

    `random.Random(seed)` is not: it gives the same each time.
    """
    name = call.func
    if not isinstance(name, ast.Attribute) or (name.attr == "Random" and call.args):
        return False
    owner = name.value.attr if isinstance(name.value, ast.Attribute) else getattr(name.value, "id", "")
    functions = _UNSTEADY.get(owner, set())
    return functions is None or name.attr in functions
