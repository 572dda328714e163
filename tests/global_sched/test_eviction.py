"""The eviction model against the definition: repeatedly take the least recently used unlocked leaf."""

import random

import pytest

from preble_sgl.core import RequestId, WorkerId, token_ids
from preble_sgl.global_sched.node import Node
from preble_sgl.global_sched.radix_tree import RadixTree

W = WorkerId("w0")
OTHER = WorkerId("w1")


def packed(*tokens: int) -> bytes:
    return token_ids(tokens).tobytes()


def make_tree(capacity: int) -> RadixTree:
    tree = RadixTree(window_s=180.0)
    tree.add_worker(W, capacity=capacity)
    tree.add_worker(OTHER, capacity=1_000_000)
    return tree


def prefix(node: Node) -> list[int]:
    ids: list[int] = []
    while node.parent is not None:
        ids = list(memoryview(node.key).cast("i")) + ids
        node = node.parent
    return ids


def candidates(tree: RadixTree, need_len: int) -> list[list[int]]:
    return [prefix(node) for node in tree.eviction_candidates(W, need_len)]


def len_on(tree: RadixTree, *tokens: int) -> int:
    return tree.match("", packed(*tokens)).len_on(W)


def test_the_least_recently_used_leaf_goes_first_and_whole() -> None:
    tree = make_tree(capacity=9)
    for first in (10, 20, 30):
        tree.insert("", packed(first, 1, 2), W)
    tree.insert("", packed(10, 1, 2), W)
    tail = tree.bind("", packed(40), W, RequestId("r"))
    assert [len_on(tree, first, 1, 2) for first in (10, 20, 30)] == [3, 0, 3]
    tree.release(tail, W, RequestId("r"))
    tree.check_invariants()


def test_a_prompt_in_use_is_never_evicted_even_beyond_the_capacity() -> None:
    tree = make_tree(capacity=4)
    tail = tree.bind("", packed(1, 2, 3), W, RequestId("a"))
    tree.bind("", packed(7, 8, 9), W, RequestId("b"))
    assert tree.used_tokens(W) == 6
    assert tree.free_tokens(W) == 0
    tree.mark_computed(tail, W)
    tree.unlock(tail, W)
    assert (len_on(tree, 1, 2, 3), len_on(tree, 7, 8, 9)) == (0, 3)


def test_a_parent_follows_its_last_child_and_keeps_the_childs_last_use() -> None:
    tree = make_tree(capacity=100)
    tree.insert("", packed(1, 2, 3), W)
    tree.insert("", packed(50), W)
    tree.insert("", packed(1, 2, 4), W)
    assert candidates(tree, 100) == [[1, 2, 3], [50], [1, 2, 4], [1, 2]]


def test_a_parent_keeps_the_last_use_of_a_child_that_is_gone() -> None:
    tree = make_tree(capacity=8)
    tree.insert("", packed(1, 2, 3), W)
    other = tree.bind("", packed(50), W, RequestId("other"))
    tree.mark_computed(other, W)
    tree.insert("", packed(1, 2, 4), W)
    big = tree.bind("", packed(90, 91, 92, 93, 94), W, RequestId("big"))
    assert [len_on(tree, 1, 2, last) for last in (3, 4)] == [2, 2], "both children are gone"
    tree.unlock(other, W)
    tree.release(big, W, RequestId("big"))
    assert candidates(tree, 100) == [[50], [1, 2]]


def test_asking_for_candidates_changes_nothing() -> None:
    tree = make_tree(capacity=100)
    for first in range(10, 20):
        tree.insert("", packed(first, 1), W)
    once = candidates(tree, 7)
    assert once == [[10, 1], [11, 1], [12, 1], [13, 1]]
    assert candidates(tree, 7) == once
    assert candidates(tree, 3) == once[:2]
    assert candidates(tree, 0) == []
    assert tree.used_tokens(W) == 20
    tree.check_invariants()


def test_a_leaf_used_after_it_was_listed_moves_back() -> None:
    tree = make_tree(capacity=100)
    for first in (10, 20, 30):
        tree.insert("", packed(first), W)
    assert candidates(tree, 3) == [[10], [20], [30]]
    tail = tree.bind("", packed(10), W, RequestId("r"))
    assert candidates(tree, 3) == [[20], [30]]
    tree.mark_computed(tail, W)
    tree.unlock(tail, W)
    assert candidates(tree, 3) == [[20], [30], [10]]


def test_each_worker_evicts_its_own_share() -> None:
    tree = make_tree(capacity=3)
    for worker_id in (W, OTHER):
        tree.insert("", packed(1, 2, 3), worker_id)
    tree.bind("", packed(9), W, RequestId("r"))
    assert tree.match("", packed(1, 2, 3)).lens == {OTHER: 3}


def test_the_order_stays_as_small_as_the_leaves_when_they_go_unasked() -> None:
    tree = make_tree(capacity=100)
    tree.start_exact(W)
    kept = tree.store("", None, packed(1, 2), W)
    assert kept.shares[W].listed
    for number in range(1000):
        tree.insert("", packed(10 + number), W)
        tree.settle(W)
    assert len(tree._caches[W].order) <= 3
    assert candidates(tree, 100) == [[1, 2]]


def naive_order(tree: RadixTree) -> list[list[int]]:
    """Scan all nodes for the least recently used leaf, again and again."""
    held = {id(node): node for node in tree.trie.nodes() if W in node.shares}
    last_used = {key: node.shares[W].last_used for key, node in held.items()}
    order: list[list[int]] = []
    while True:
        parents = {id(node.parent) for node in held.values()}
        leaves = [
            node
            for key, node in held.items()
            if key not in parents and node.shares[W].computed and not node.shares[W].locks
        ]
        if not leaves:
            return order
        victim = min(leaves, key=lambda node: last_used[id(node)])
        order.append(prefix(victim))
        del held[id(victim)]
        if id(victim.parent) in held:
            last_used[id(victim.parent)] = max(last_used[id(victim.parent)], last_used[id(victim)])


@pytest.mark.parametrize("seed", range(6))
def test_order_and_evictions_agree_with_a_scan_of_all_nodes_after_every_step(seed: int) -> None:
    rng = random.Random(seed)
    tree = make_tree(capacity=40)
    bound: dict[RequestId, tuple[Node, bytes]] = {}
    for number in range(250):
        prompt = packed(*rng.choices([1, 2, 3], k=rng.randint(1, 8)))
        if bound and rng.random() < 0.55:
            request_id = rng.choice(list(bound))
            tail, old_prompt = bound.pop(request_id)
            if rng.random() < 0.7:
                tree.insert("", old_prompt + packed(rng.randint(1, 9)), W)
                tree.unlock(tail, W)
            else:
                tree.release(tail, W, request_id)
        else:
            bound[RequestId(str(number))] = tree.bind("", prompt, W, RequestId(str(number))), prompt
        if rng.random() < 0.3:
            tree.insert("", packed(*rng.choices([1, 2, 3], k=rng.randint(1, 8))), OTHER)
        tree.check_invariants()
        order = naive_order(tree)
        need_len = rng.choice([1, 5, 1000])
        assert candidates(tree, need_len) == order[: len(candidates(tree, need_len))]
        assert candidates(tree, 1000) == order
