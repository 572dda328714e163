"""The prefix tree cut down to what a picture can show: its largest nodes, the rest of each subtree as one.

Nodes are taken largest subtree first, from the roots down, until there are as many as may be shown; what is
left of a node's children is summed up in one entry behind them. O(nodes) to sum, O(shown * log) to choose.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.node import Node


@dataclass(frozen=True, slots=True)
class PicturedNode:
    """One shown node, or `num_merged` that are not shown one by one.

    `parent`: its place in the list. `start_len`, `num_tokens`: where its edge begins and how long it is, of
    several merged ones the sum. `subtree_tokens`: its edge and all behind it. `workers`: who has it.
    `num_recent`: requests of the window that had it as prefix. `num_expected`: open programs that will.
    """

    parent: int | None
    start_len: int
    num_tokens: int
    subtree_tokens: int
    workers: tuple[WorkerId, ...]
    num_recent: int
    num_expected: int
    num_merged: int = 0


def picture(roots: Iterable[Node], most: int) -> list[PicturedNode]:
    """Return at most `most` nodes and one merged entry for each that has others behind it."""
    tops = [child for root in roots for child in root.children.values()]
    sizes = _subtree_tokens(tops)
    order = count()
    waiting: list[tuple[int, int, Node, int | None]] = []

    def put(nodes: Iterable[Node], parent: int | None) -> None:
        for node in nodes:
            heapq.heappush(waiting, (-sizes[node], next(order), node, parent))

    shown: list[PicturedNode] = []
    put(tops, None)
    while waiting and len(shown) < most:
        _, _, node, parent = heapq.heappop(waiting)
        put(node.children.values(), len(shown))
        shown.append(_shown(node, parent, sizes[node]))
    return shown + list(_merged(waiting, sizes))


def _shown(node: Node, parent: int | None, size: int) -> PicturedNode:
    return PicturedNode(
        parent,
        node.start_len,
        node.num_tokens,
        size,
        tuple(sorted(node.shares)),
        sum(node.recent.values()),
        node.expected,
    )


def _merged(left: list[tuple[int, int, Node, int | None]], sizes: dict[Node, int]) -> Iterator[PicturedNode]:
    by_parent: dict[int | None, list[Node]] = {}
    for _, _, node, parent in left:
        by_parent.setdefault(parent, []).append(node)
    for parent, nodes in by_parent.items():
        total = sum(sizes[node] for node in nodes)
        workers = tuple(sorted({worker_id for node in nodes for worker_id in node.shares}))
        recent = sum(sum(node.recent.values()) for node in nodes)
        expected = sum(node.expected for node in nodes)
        yield PicturedNode(parent, nodes[0].start_len, total, total, workers, recent, expected, len(nodes))


def _subtree_tokens(tops: list[Node]) -> dict[Node, int]:
    """Return the tokens of each node and all behind it; without recursion, as conversations are deep."""
    order = list(tops)
    for node in order:
        order.extend(node.children.values())
    sizes: dict[Node, int] = {}
    for node in reversed(order):
        sizes[node] = node.num_tokens + sum(sizes[child] for child in node.children.values())
    return sizes
