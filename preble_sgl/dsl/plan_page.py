"""A plan as one page that needs nothing else: its numbers, its prefix tree, its call graph, a table.

The template has the markup, this file the numbers in it. The tree is laid out in `icicle`. The call graph is
laid out in layers (Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System
Structures", 1981):

1. Edges are taken in program order; one that would close a circle goes back, and is drawn as a curve below.
2. A node stands one layer right of the last of those that it waits for.
3. An edge that skips layers gets a free slot in each of them, so that it passes between nodes.
4. Within a layer nodes and slots stand in the order of the mean height of what they come from.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

from preble_sgl.dsl.bounds import Bounds
from preble_sgl.dsl.call_graph import CallGraph, CallNode, call_graph
from preble_sgl.dsl.explain import stops
from preble_sgl.dsl.icicle import Icicle, Place, icicle

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan

BOX = (200, 76)
GAP = (96, 22)
SLOT = 14
MARGIN = 14
BEND = 34
"""Of the drawn call graph, in pixels: a node, the room between two, the height of a free slot, the edge of
the picture, how far a curve that goes back sinks below what it passes."""


def page(plan: "Plan") -> str:
    """Return the page as HTML. It grows with the places in the program, not with the rows."""
    from jinja2 import Environment, StrictUndefined

    template = files("preble_sgl.dsl").joinpath("plan_page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = count
    tree = icicle(plan.tree())
    return environment.from_string(template).render(
        name=plan.name,
        figures=figures(plan),
        findings=list(_findings(plan)),
        tree=Picture.of(tree),
        num_left_out=tree.num_left_out,
        graph=drawn(call_graph(plan)),
        box_size=BOX,
    )


def count(number: float) -> str:
    """Write a number of tokens or calls."""
    return f"{number:,.0f}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One large number: what it counts, and what there is to say below it, line by line."""

    label: str
    number: str
    notes: tuple[str, ...] = ()


def figures(plan: "Plan") -> tuple[Figure, ...]:
    """Return the numbers at the top of the page."""
    prompt, reusable = plan.bounds.prompt_tokens, plan.bounds.reusable_tokens
    rate = reusable.expected / prompt.expected if prompt.expected else 0.0
    to_compute = f"{count(prompt.expected - reusable.expected)} to compute"
    return (
        Figure("rows", f"{len(plan.traces):,}"),
        _figure("calls", plan.bounds.calls),
        _figure("prompt tokens", prompt),
        _figure("reusable tokens", reusable),
        Figure("reuse rate", f"{rate:.0%}", (to_compute,) if prompt.expected else ()),
    )


def _figure(label: str, bounds: Bounds) -> Figure:
    if bounds.lower == bounds.upper:
        return Figure(label, count(bounds.expected))
    most = "no upper bound" if bounds.upper is None else f"at most {bounds.upper:,}"
    return Figure(f"{label} expected", count(bounds.expected), (f"at least {bounds.lower:,}", most))


def _findings(plan: "Plan") -> Iterator[tuple[str, str]]:
    """Yield what somebody should know of the plan, and of what sort it is."""
    yield from (("not read", text) for text in stops(plan))
    yield from (("warning", text) for text in plan.warnings)
    yield from (("advice", text) for text in plan.lint())


@dataclass(frozen=True, slots=True)
class Picture:
    """The drawn prefix tree. `width` in tokens, `height` in calls, `pixels` high on the page."""

    places: tuple[Place, ...]
    tokens: float
    width: float
    height: float
    pixels: int

    @classmethod
    def of(cls, tree: Icicle) -> "Picture":
        """Make the picture as high as it has rows, within limits."""
        roots = [place for place in tree.places if place.parent is None]
        num_ends = len(tree.places) - len({place.parent for place in tree.places} - {None})
        return cls(
            tree.places,
            tree.tokens,
            max((place.reach for place in roots), default=0.0),
            sum(place.height for place in roots),
            min(640, max(340, 30 * num_ends)),
        )

    def share(self, place: Place) -> float:
        """Return which share of all prompt tokens comes from a place, 0 to 1."""
        return place.tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Box:
    """A node of the drawn call graph, by its upper left corner."""

    node: CallNode
    x: float
    y: float

    @property
    def mean_prompt_len(self) -> float:
        """Mean length of the prompts, in tokens."""
        return self.node.prompt_tokens / self.node.calls.expected if self.node.calls.expected else 0.0


@dataclass(frozen=True, slots=True)
class Arrow:
    """An edge: its SVG path, where its label stands, how many calls wait, and whether it goes back."""

    path: str
    x: float
    y: float
    calls: float
    goes_back: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """The drawn call graph, in pixels."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    width: float
    height: float


Edge = tuple[str, str]
Slot = tuple[str, str, int]
"""Where an edge passes a layer, or `(line, line, layer)`: where a node stands."""


def drawn(graph: CallGraph) -> Drawing:
    """Lay out a call graph from left to right. O(edges x (nodes + edges)), for at most some hundred nodes."""
    forward = _forward(graph)
    layer = _layers(graph.nodes, forward)
    tracks = {edge: _track(edge, layer) for edge in forward}
    columns = _columns(layer, tracks.values())
    middle = _middles(columns)
    boxes = {
        line: Box(node, _left(layer[line]), middle[line, line, layer[line]] - BOX[1] / 2)
        for line, node in graph.nodes.items()
    }
    arrows = [_ahead([(_left(s[2]), middle[s]) for s in tracks[e]], graph.edges[e]) for e in forward]
    for a, b in graph.edges:
        if (a, b) not in tracks:
            first, last = sorted((layer[a], layer[b]))
            lowest = max(box.y for line, box in boxes.items() if first <= layer[line] <= last) + BOX[1]
            arrows.append(_back(boxes[a], boxes[b], lowest, graph.edges[a, b]))
    bottom = [box.y + BOX[1] for box in boxes.values()] + [a.y for a in arrows]
    width = max((box.x + BOX[0] for box in boxes.values()), default=0) + MARGIN
    return Drawing(tuple(boxes.values()), tuple(arrows), width, max(bottom, default=0) + MARGIN)


def _forward(graph: CallGraph) -> list[Edge]:
    """Return the edges without those that close a circle; edges down the program come first."""
    place = {line: i for i, line in enumerate(graph.nodes)}
    after: dict[str, set[str]] = defaultdict(set)
    kept = []
    for edge in sorted(graph.edges, key=lambda edge: place[edge[0]] >= place[edge[1]]):
        if not _reaches(after, edge[1], edge[0]):
            after[edge[0]].add(edge[1])
            kept.append(edge)
    return kept


def _reaches(after: Mapping[str, set[str]], start: str, end: str) -> bool:
    seen, todo = {start}, [start]
    while todo:
        line = todo.pop()
        if line == end:
            return True
        new = after.get(line, set()) - seen
        seen |= new
        todo.extend(new)
    return False


def _layers(lines: Iterable[str], forward: list[Edge]) -> dict[str, int]:
    """Return the length of the longest path to every line."""
    layer = dict.fromkeys(lines, 0)
    moved = True
    while moved:
        moved = False
        for a, b in forward:
            if layer[b] <= layer[a]:
                layer[b], moved = layer[a] + 1, True
    return layer


def _track(edge: Edge, layer: Mapping[str, int]) -> list[Slot]:
    """Return the slots of an edge: its ends, and one in every layer between."""
    a, b = edge
    between = [(a, b, i) for i in range(layer[a] + 1, layer[b])]
    return [(a, a, layer[a]), *between, (b, b, layer[b])]


def _columns(layer: Mapping[str, int], tracks: Iterable[list[Slot]]) -> list[list[Slot]]:
    """Return the slots of each layer from top to bottom."""
    columns: list[list[Slot]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    comes_from: dict[Slot, list[Slot]] = defaultdict(list)
    slots = {(line, line, i): None for line, i in layer.items()}
    for track in tracks:
        for before, slot in pairwise(track):
            comes_from[slot].append(before)
            slots[slot] = None
    rank: dict[Slot, float] = {}
    for i, column in enumerate(columns):
        mean = {slot: _mean([rank[other] for other in comes_from[slot]]) for slot in slots if slot[2] == i}
        column.extend(sorted(mean, key=lambda s: (mean[s], s[0] == s[1])))
        rank |= {slot: (n + 1) / (len(column) + 1) for n, slot in enumerate(column)}
    return columns


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / max(1, len(numbers))


def _middles(columns: list[list[Slot]]) -> dict[Slot, float]:
    """Return the height of the middle of every slot; columns are centred on one another."""
    heights = [[BOX[1] if a == b else SLOT for a, b, _ in column] for column in columns]
    wholes = [sum(column) + GAP[1] * (len(column) - 1) for column in heights]
    middles = {}
    for column, high, whole in zip(columns, heights, wholes, strict=True):
        y = MARGIN + (max(wholes) - whole) / 2
        for slot, height in zip(column, high, strict=True):
            middles[slot] = y + height / 2
            y += height + GAP[1]
    return middles


def _left(layer: int) -> float:
    return MARGIN + layer * (BOX[0] + GAP[0])


def _ahead(points: list[tuple[float, float]], calls: float) -> Arrow:
    """Draw an edge through the slots whose left ends are given."""
    x, y = points[0][0] + BOX[0], points[0][1]
    path, label = f"M{x:.1f} {y:.1f}", (x, y)
    for number, (next_x, next_y) in enumerate(points[1:]):
        bend = (x + next_x) / 2
        path += f"C{bend:.1f} {y:.1f} {bend:.1f} {next_y:.1f} {next_x:.1f} {next_y:.1f}"
        label = (bend, (y + next_y) / 2) if number == 0 else label
        x, y = next_x + BOX[0], next_y
        path += f"H{x:.1f}" if number < len(points) - 2 else ""
    return Arrow(path, *label, calls, False)


def _back(start: Box, end: Box, lowest: float, calls: float) -> Arrow:
    """Draw an edge of a loop below what it passes."""
    x, next_x = start.x + BOX[0] * 0.65, end.x + BOX[0] * 0.35
    y, next_y = start.y + BOX[1], end.y + BOX[1]
    peak = lowest + BEND
    control = (peak - (y + next_y) / 8) / 0.75  # a cubic is at 3/4 of its two controls and 1/8 of its ends
    path = f"M{x:.1f} {y:.1f}C{x:.1f} {control:.1f} {next_x:.1f} {control:.1f} {next_x:.1f} {next_y:.1f}"
    return Arrow(path, (x + next_x) / 2, peak, calls, True)
