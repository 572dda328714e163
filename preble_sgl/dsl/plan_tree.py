"""The templated prefix tree of a plan: one node per place in the program's text, over all rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from preble_sgl.dsl.bounds import NONE, Bounds
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.prefix_counts import has_holes, new_ranges
from preble_sgl.dsl.tracer import TracedCall

Kind = Literal["constant", "argument", "generated"]

MOST_SAMPLES = 3


@dataclass(slots=True)
class PlanNode:
    """One place in the program's text, over all rows.

    `tokens` counts the prompt tokens that come from here over all calls, `new_tokens` those that no
    earlier prompt had; the rest are reused. Both, and `calls`, are expected numbers: a call that is made in
    some readings counts by their weight. `texts` is the number of different beginnings of prompts that end
    here; `samples` are up to MOST_SAMPLES different texts of this place alone, as packed ids. `num_calls` has
    the bounds of `calls`.
    """

    label: str
    calls: float = 0.0
    tokens: float = 0.0
    new_tokens: float = 0.0
    texts: int = 0
    num_calls: Bounds = NONE
    has_generated: bool = False
    samples: list[bytes] = field(default_factory=list)
    children: "dict[str, PlanNode]" = field(default_factory=dict)

    @property
    def mean_len(self) -> float:
        """Mean length of this stretch of a prompt, in tokens."""
        return self.tokens / self.calls if self.calls else 0.0

    @property
    def reused_tokens(self) -> float:
        """Tokens from here that need not be computed."""
        return self.tokens - self.new_tokens

    @property
    def kind(self) -> Kind:
        """Whether the text of this place is always the same, differs by row, or is generated."""
        if self.has_generated:
            return "generated"
        return "argument" if len(self.samples) > 1 else "constant"


def build_tree(name: str, traces: Sequence[Trace]) -> PlanNode:
    """Return the tree of all readings of all rows. O(n log n) in their calls."""
    root = PlanNode(name)
    weights, calls = _all_calls(traces)
    nodes: dict[int, list[PlanNode]] = {}
    for call, new in new_ranges(calls):
        nodes[id(call)] = _count(root, call, new, weights[id(call)])
    for trace in traces:
        _count_bounds(trace, nodes)
    return root


def _all_calls(traces: Sequence[Trace]) -> tuple[dict[int, float], list[TracedCall]]:
    """Return every call once, and by its identity how likely it is made."""
    weights: dict[int, float] = {}
    calls = []
    for trace in traces:
        for reading, weight in zip(trace.readings, trace.weights, strict=True):
            for call in reading.calls:
                if id(call) not in weights:
                    calls.append(call)
                weights[id(call)] = weights.get(id(call), 0.0) + weight
    return weights, calls


def _count(root: PlanNode, call: TracedCall, new: range, weight: float) -> list[PlanNode]:
    """Count a call at every place that its prompt comes from; return those places."""
    node, start, places = root, 0, []
    for label, end in stretches(call):
        node = node.children.setdefault(label, PlanNode(label))
        node.calls += weight
        node.tokens += weight * (end - start)
        node.new_tokens += weight * max(0, end - max(start, new.start))
        node.texts += start < end and new.start < end
        _sample(node, call.request.prompt[start:end].tobytes())
        start = end
        places.append(node)
    return places


def _sample(node: PlanNode, text: bytes) -> None:
    if len(node.samples) < MOST_SAMPLES and text not in node.samples:
        node.samples.append(text)
        node.has_generated = node.has_generated or has_holes(text)


def stretches(call: TracedCall) -> list[tuple[str, int]]:
    """Return where each stretch of a call's prompt comes from, and where it ends."""
    found = [(segment.label, segment.end) for segment in call.segments]
    if call.request.score_from is not None:
        found.append(("choice " + call.line, len(call.request.prompt)))
    return found


def _count_bounds(trace: Trace, nodes: dict[int, list[PlanNode]]) -> None:
    """Add one row's least and most calls to every place that it touches."""
    sums = [
        Counter({id(node): 0 for call in reading.calls for node in nodes[id(call)]})
        for reading in trace.readings
    ]
    touched = {}
    for reading, counted in zip(trace.readings, sums, strict=True):
        for call in reading.calls:
            for node in nodes[id(call)]:
                counted[id(node)] += 1
                touched[id(node)] = node
    for key, node in touched.items():
        counts = [counted[key] for counted in sums]
        expected = sum(weight * count for weight, count in zip(trace.weights, counts, strict=True))
        node.num_calls += Bounds(min(counts), expected, None if trace.is_open else max(counts))
