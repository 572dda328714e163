"""The call graph of a plan: one node per line that calls the model, one edge where one waits for another."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preble_sgl.dsl.bounds import NONE, Bounds
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.tracer import Reading

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan


@dataclass(slots=True)
class CallNode:
    """The calls of one line: how many, how long their prompts, and what they may generate, in tokens."""

    line: str
    calls: Bounds = NONE
    prompt_tokens: float = 0.0
    output_len: int = 0


@dataclass(frozen=True, slots=True)
class CallGraph:
    """Lines in the order in which they are first reached. An edge counts the calls that wait for others."""

    nodes: dict[str, CallNode]
    edges: dict[tuple[str, str], float]


def call_graph(plan: "Plan") -> CallGraph:
    """Return the graph of all readings of all rows; counts of readings are weighted. O(calls)."""
    graph = CallGraph({}, {})
    for trace in plan.traces:
        _count_calls(graph, trace)
        for reading, weight in zip(trace.readings, trace.weights, strict=True):
            _count_edges(graph, reading, weight)
    return graph


def _count_calls(graph: CallGraph, trace: Trace) -> None:
    counts = [Counter(call.line for call in reading.calls) for reading in trace.readings]
    lines = dict.fromkeys(call.line for reading in trace.readings for call in reading.calls)
    for line in lines:
        numbers = [count[line] for count in counts]
        expected = sum(weight * number for weight, number in zip(trace.weights, numbers, strict=True))
        node = graph.nodes.setdefault(line, CallNode(line))
        node.calls += Bounds(min(numbers), expected, None if trace.is_open else max(numbers))


def _count_edges(graph: CallGraph, reading: Reading, weight: float) -> None:
    for call in reading.calls:
        node = graph.nodes[call.line]
        node.prompt_tokens += weight * len(call.request.prompt)
        node.output_len = max(node.output_len, call.output_len.upper)
        for line in {reading.calls[number].line for number in call.after}:
            edge = (line, call.line)
            graph.edges[edge] = graph.edges.get(edge, 0.0) + weight


def mermaid(plan: "Plan") -> str:
    """Return the graph as a Mermaid flowchart."""
    graph = call_graph(plan)
    ids = {line: f"c{number}" for number, line in enumerate(graph.nodes)}
    nodes = [f'    {ids[line]}["{line}<br/>{node.calls} calls"]' for line, node in graph.nodes.items()]
    edges = [f"    {ids[a]} -->|{count:,.0f}| {ids[b]}" for (a, b), count in graph.edges.items()]
    return "\n".join(["flowchart TD", *nodes, *edges]) + "\n"
