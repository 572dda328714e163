"""The prefix tree as rectangles: areas are tokens, children stand within their parents, nothing overlaps."""

import random
from itertools import combinations, pairwise

import pytest

from preble_sgl.dsl.icicle import Icicle, Place, icicle
from preble_sgl.dsl.plan_tree import PlanNode


def node(label: str, calls: float, length: float, *, texts: int = 1, reused: float = 0.0) -> PlanNode:
    tokens = calls * length
    return PlanNode(label, calls=calls, tokens=tokens, new_tokens=tokens * (1 - reused), texts=texts)


def tree(*children: PlanNode) -> PlanNode:
    root = PlanNode("program")
    root.children = {child.label: child for child in children}
    return root


def chain(*nodes: PlanNode) -> PlanNode:
    """Hang each node below the one before it; return the first."""
    for parent, child in pairwise(nodes):
        parent.children[child.label + str(id(child))] = child
    return nodes[0]


def random_tree(rng: random.Random) -> PlanNode:
    root = PlanNode("program", calls=rng.randint(1, 1000))
    _grow(rng, root, 0)
    return root


def _grow(rng: random.Random, parent: PlanNode, depth: int) -> None:
    left = parent.calls
    for number in range(rng.randint(0 if depth else 1, 4) if depth < 5 else 0):
        calls = left * rng.random()
        left -= calls
        line = f"p.py:{rng.randint(1, 3)}"
        child = node(f"{rng.choice(['user', 'gen', 'assistant'])} {line}", calls, rng.randint(0, 500))
        parent.children[str(number)] = child
        _grow(rng, child, depth + 1)


def nodes_below(root: PlanNode) -> list[PlanNode]:
    found = [root]
    for each in found:
        found.extend(each.children.values())
    return found[1:]


def overlap(one: Place, other: Place) -> float:
    across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    return max(0.0, across) * max(0.0, down)


def check_layout(drawn: Icicle) -> None:
    for place in drawn.places:
        assert place.width * place.height == pytest.approx(place.tokens)
        if place.parent is not None:
            parent = drawn.places[place.parent]
            assert place.x == parent.x + parent.width
            assert parent.y <= place.y + 1e-6
            assert place.y + place.height <= parent.y + parent.height + 1e-6
            assert place.reach <= parent.reach
    for one, other in combinations(drawn.places, 2):
        assert overlap(one, other) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_areas_are_tokens_and_children_stand_in_their_parents_without_overlap(seed: int) -> None:
    root = random_tree(random.Random(seed))
    drawn = icicle(root, most=10_000)
    check_layout(drawn)
    shown = [each for place in drawn.places for each in place.nodes]
    assert sorted(map(id, shown)) == sorted(map(id, nodes_below(root)))
    assert drawn.tokens == pytest.approx(sum(each.tokens for each in nodes_below(root)))


@pytest.mark.parametrize("seed", range(40))
def test_of_a_large_tree_the_places_with_most_tokens_below_them_are_kept(seed: int) -> None:
    root = random_tree(random.Random(seed))
    whole, part = icicle(root, most=10_000), icicle(root, most=8)
    check_layout(part)
    assert len(part.places) + part.num_left_out == len(whole.places)
    assert len(part.places) == min(8, len(whole.places))
    assert part.tokens == whole.tokens
    kept = {id(place.nodes[0]) for place in part.places}
    tokens_below = {id(p.nodes[0]): _tokens_below(p.nodes[0]) for p in whole.places}
    left_out = [tokens for key, tokens in tokens_below.items() if key not in kept]
    assert max(left_out, default=0) <= min(tokens_below[key] for key in kept) + 1e-6


def _tokens_below(top: PlanNode) -> float:
    return top.tokens + sum(each.tokens for each in nodes_below(top))


def test_a_row_reads_from_left_to_right_and_branches_stand_below_one_another() -> None:
    question, answer = node("user p.py:3", 6, 20), node("output p.py:4", 2, 40)
    root = tree(chain(node("system p.py:1", 10, 100)))
    root.children["system p.py:1"].children = {"q": question, "a": answer}
    system, first, second = icicle(root).places
    assert (system.x, system.y, system.width, system.height, system.reach) == (0, 0, 100, 10, 140)
    assert (first.x, first.y, first.width, first.height, first.reach) == (100, 0, 20, 6, 120)
    assert (second.x, second.y, second.width, second.height, second.reach) == (100, 6, 40, 2, 140)


def test_messages_that_one_line_writes_are_one_rectangle() -> None:
    shots = [node(f"{role} p.py:2", 5, 10, reused=0.8) for role in ("user", "assistant") * 8]
    drawn = icicle(tree(chain(node("system p.py:1", 5, 50), *shots, node("user p.py:3", 5, 7))))
    assert [place.label for place in drawn.places] == ["system p.py:1", "16 messages p.py:2", "user p.py:3"]
    messages = drawn.places[1]
    assert (messages.width, messages.tokens, messages.parent) == (160, 800, 0)
    assert messages.reused_tokens == pytest.approx(640)
    assert messages.reused_rate == pytest.approx(0.8)
    assert drawn.places[2].x == 210


@pytest.mark.parametrize(
    ("why", "last"),
    [
        ("another line", node("user p.py:9", 5, 10)),
        ("fewer calls", node("user p.py:2", 4, 10)),
        ("another kind", PlanNode("user p.py:2", calls=5, tokens=50, has_generated=True)),
        ("no message", node("gen p.py:2", 5, 10)),
    ],
)
def test_messages_stay_apart_that_are_not_of_one_run(why: str, last: PlanNode) -> None:
    drawn = icicle(tree(chain(node("system p.py:2", 5, 50), node("user p.py:2", 5, 10), last)))
    assert len(drawn.places) == 3, why


def test_a_conversation_of_many_turns_is_no_deeper_than_can_be_drawn() -> None:
    turns = [node(f"user p.py:{i}", 1, 2) for i in range(3000)]
    drawn = icicle(tree(chain(*turns)), most=4000)
    assert drawn.places[-1].x == 2 * 2999
    assert {place.reach for place in drawn.places} == {6000}


def test_an_empty_tree_has_no_rectangles() -> None:
    assert icicle(PlanNode("nothing")) == Icicle((), 0, 0)
