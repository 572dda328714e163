"""The prefix tree of a plan as rectangles: along the prompt to the right, share of the calls downwards.

A place in the program's text is as wide as its stretch of a prompt is long on average, and as high as many
calls have it in their prompts. So its area is the number of prompt tokens that come from there, and a line
drawn from left to right crosses what one call sends, in order. Children stand right of their parent, one
below the other, within its height; what they leave free are calls whose prompt ends at the parent. (Kruskal
and Landwehr, "Icicle Plots: Better Displays for Hierarchical Clustering", 1983.)

A run of messages that one line writes is one rectangle, as few-shot examples are. Of a tree with too many
places those are kept below which there are most tokens. A parent has at least the tokens of its child, so
that what is kept hangs together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from preble_sgl.dsl.plan_tree import Kind, PlanNode

MOST_PLACES = 200
"""Rectangles of one picture: it bounds the size of the page."""

LEAST_RUN = 3
"""Messages of one line that become one rectangle."""

_MESSAGES = {"system", "user", "assistant", "tool", "text"}


@dataclass(frozen=True, slots=True)
class Place:
    """One rectangle: x and width in tokens, y and height in calls.

    `nodes`: the place, or the run of messages, that it stands for. `parent`: index of the rectangle to its
    left. `reach`: where the longest prompt that goes through here ends, on average.
    """

    nodes: tuple[PlanNode, ...]
    parent: int | None
    x: float
    y: float
    width: float
    height: float
    reach: float

    @property
    def label(self) -> str:
        """What wrote it, and the line."""
        return f"{self.role} {self.line}"

    @property
    def role(self) -> str:
        """What wrote it: a role, `gen`, `output`, `choice`, or how many messages."""
        if len(self.nodes) > 1:
            return f"{len(self.nodes)} messages"
        return self.nodes[0].label.partition(" ")[0]

    @property
    def line(self) -> str:
        """The `file.py:12` that wrote it."""
        return self.nodes[0].label.partition(" ")[2]

    @property
    def kind(self) -> Kind:
        """Whether its text is always the same, differs by row, or is generated."""
        return self.nodes[0].kind

    @property
    def texts(self) -> int:
        """How many different beginnings of prompts end here."""
        return self.nodes[-1].texts

    @property
    def tokens(self) -> float:
        """Prompt tokens from here over all calls: the area."""
        return sum(node.tokens for node in self.nodes)

    @property
    def reused_tokens(self) -> float:
        """Those of them that need not be computed."""
        return sum(node.reused_tokens for node in self.nodes)

    @property
    def reused_rate(self) -> float:
        """Reused share of its tokens, 0 to 1."""
        return self.reused_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Icicle:
    """All rectangles, parents before their children in program order.

    `tokens`: prompt tokens of the whole tree. `num_left_out`: rectangles that there was no room for.
    """

    places: tuple[Place, ...]
    tokens: float
    num_left_out: int = 0


def icicle(root: PlanNode, most: int = MOST_PLACES) -> Icicle:
    """Return the rectangles of a tree, at most `most`. O(n log n) in its places; any depth."""
    runs = _runs(root)
    kept = _largest(runs, most)
    index_of = {old: new for new, old in enumerate(kept)}
    shown = [(nodes, None if up is None else index_of[up]) for nodes, up in (runs[old] for old in kept)]
    tokens = sum(node.tokens for nodes, _ in runs for node in nodes)
    return Icicle(_placed(shown), tokens, len(runs) - len(kept))


Run = tuple[tuple[PlanNode, ...], int | None]
"""What becomes one rectangle, and the index of its parent."""


def _runs(root: PlanNode) -> list[Run]:
    """Return what becomes a rectangle each, parents first."""
    found: list[Run] = []
    todo: list[tuple[PlanNode, int | None]] = [(child, None) for child in reversed(root.children.values())]
    while todo:
        node, parent = todo.pop()
        run = _run_from(node)
        todo.extend((child, len(found)) for child in reversed(run[-1].children.values()))
        found.append((run, parent))
    return found


def _run_from(node: PlanNode) -> tuple[PlanNode, ...]:
    """Return the messages that one line writes from here on, or the node alone."""
    run = [node]
    while len(run[-1].children) == 1:
        (child,) = run[-1].children.values()
        if not _goes_on(run[-1], child):
            break
        run.append(child)
    return tuple(run) if len(run) >= LEAST_RUN else (node,)


def _goes_on(node: PlanNode, child: PlanNode) -> bool:
    """Return whether two places are messages of one line and have the same calls."""
    (role, _, line), (child_role, _, child_line) = node.label.partition(" "), child.label.partition(" ")
    alike = line == child_line and node.kind == child.kind and node.calls == child.calls
    return alike and role in _MESSAGES and child_role in _MESSAGES


def _largest(runs: list[Run], most: int) -> list[int]:
    """Return the indices of the runs below which there are most tokens, in program order."""
    total = [sum(node.tokens for node in nodes) for nodes, _ in runs]
    for i, parent in _children_first(runs):
        total[parent] += total[i]
    return sorted(sorted(range(len(runs)), key=lambda i: (-total[i], i))[:most])


def _placed(runs: list[Run]) -> tuple[Place, ...]:
    """Give every run its corner and size: right of its parent, below its elder siblings."""
    corners: list[tuple[float, float]] = []
    free_y: dict[int | None, float] = {None: 0.0}
    right = [0.0] * len(runs)
    for i, (nodes, parent) in enumerate(runs):
        x = 0.0 if parent is None else right[parent]
        y = free_y[parent]
        free_y[parent], free_y[i] = y + nodes[0].calls, y
        right[i] = x + _width(nodes)
        corners.append((x, y))
    reach = list(right)
    for i, parent in _children_first(runs):
        reach[parent] = max(reach[parent], reach[i])
    return tuple(
        Place(nodes, parent, x, y, _width(nodes), nodes[0].calls, end)
        for (nodes, parent), (x, y), end in zip(runs, corners, reach, strict=True)
    )


def _width(nodes: tuple[PlanNode, ...]) -> float:
    return sum(node.mean_len for node in nodes)


def _children_first(runs: list[Run]) -> Iterator[tuple[int, int]]:
    """Yield every child with its parent after all of its own children."""
    for i in range(len(runs) - 1, -1, -1):
        parent = runs[i][1]
        if parent is not None:
            yield i, parent
