"""The tree of all requests under `preble_literal`, and its simulated LRU."""

import random

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.policies.preble_literal_tree import KV_TOKENS, HistoryNode, HistoryTree
from tests.global_sched.stories import prompt

W0, W1 = WorkerId("w0"), WorkerId("w1")


def serve(tree: HistoryTree, text: str, worker_id: WorkerId = W0) -> HistoryNode:
    leaf, _ = tree.insert("", prompt(text).tobytes())
    tree.begin(leaf, worker_id)
    tree.end(leaf, worker_id)
    return leaf


def test_a_split_keeps_the_lower_part_in_place() -> None:
    tree = HistoryTree()
    first = serve(tree, "document:100 a:10")
    leaf, split = tree.insert("", prompt("document:100 b:20").tobytes())
    assert split is first
    assert (first.start_len, first.end_len) == (100, 110)
    assert (leaf.start_len, leaf.end_len) == (100, 120)
    upper = leaf.parent
    assert upper is not None
    assert first.parent is upper
    assert (upper.is_large, upper.cached) == (True, {W0})


def test_the_leaf_behind_a_fresh_split_is_one_deeper_than_it_stands() -> None:
    tree = HistoryTree()
    serve(tree, "document:100 a:10")
    assert [serve(tree, f"document:100 {name}:10").depth for name in "bc"] == [3, 2]


def test_a_worker_is_believed_to_evict_the_oldest_beyond_the_budget_and_the_tree_keeps_all() -> None:
    tree = HistoryTree()
    leaves = [serve(tree, f"text{number}:1000") for number in range(200)]
    tree.evict(W0, [W0])
    assert [number for number, leaf in enumerate(leaves) if W0 not in leaf.cached] == [0, 1]
    assert len(tree.nodes) == 201


def test_what_is_in_use_is_not_evicted_but_imagined_last() -> None:
    tree = HistoryTree()
    leaf, _ = tree.insert("", prompt("used:1000").tobytes())
    tree.begin(leaf, W0)
    idle = serve(tree, "idle:1000")
    assert tree.would_evict(500, W0, [W0]) == [idle]
    assert tree.would_evict(1500, W0, [W0]) == [idle, leaf]
    assert tree.would_evict(500, W1, [W0, W1]) == []


def test_the_belief_never_exceeds_the_budget_once_all_is_done() -> None:
    rng = random.Random(3)
    tree = HistoryTree()
    running: list[tuple[HistoryNode, WorkerId]] = []
    for number in range(400):
        worker_id = rng.choice([W0, W1])
        text = f"document{rng.randrange(12)}:{rng.choice([4000, 8000])} own{number}:{rng.randint(1, 2000)}"
        leaf, _ = tree.insert("", prompt(text).tobytes())
        tree.begin(leaf, worker_id)
        running.append((leaf, worker_id))
        if len(running) > 5:
            tree.end(*running.pop(rng.randrange(len(running))))
        tree.evict(worker_id, [W0, W1])
    for leaf, worker_id in running:
        tree.end(leaf, worker_id)
    for worker_id in (W0, W1):
        tree.evict(worker_id, [W0, W1])
        assert sum(node.num_tokens for node in tree.nodes if worker_id in node.cached) <= KV_TOKENS
        assert all(node.refs.get(worker_id, 0) == 0 for node in tree.nodes if node.parent is not None)
