"""The prefix tree as a picture: the largest first, nothing lost."""

from preble_sgl.core import WorkerId, token_ids
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.tree_picture import PicturedNode, picture

A, B = WorkerId("a"), WorkerId("b")


def tree_of(*prompts: tuple[WorkerId, list[int]]) -> RadixTree:
    tree = RadixTree(100.0)
    for worker in (A, B):
        tree.add_worker(worker, capacity=10**6)
    for worker, prompt in prompts:
        tree.unlock(tree.insert("", token_ids(prompt).tobytes(), worker), worker)
    return tree


def total(shown: list[PicturedNode]) -> int:
    return sum(node.num_tokens for node in shown)


def test_a_shared_prefix_is_one_node_with_both_its_workers() -> None:
    shown = picture(tree_of((A, [1, 2, 3, 4]), (B, [1, 2, 9])).trie.roots(), 10)
    top, *behind = shown
    assert (top.start_len, top.num_tokens, top.subtree_tokens, top.workers) == (0, 2, 5, (A, B))
    assert [(node.parent, node.num_tokens, node.workers) for node in behind] == [(0, 2, (A,)), (0, 1, (B,))]


def test_what_does_not_fit_is_summed_up_behind_its_parent() -> None:
    prompts = [(A, [1, 2, number, number]) for number in range(10, 30)]
    shown = picture(tree_of(*prompts, (B, [7] * 50)).trie.roots(), 3)
    assert [node.num_merged for node in shown] == [0, 0, 0, 19]
    assert shown[0].subtree_tokens == 50
    assert shown[3].parent == 1
    assert total(shown) == 50 + 2 + 20 * 2


def test_deep_and_empty_trees() -> None:
    assert picture(tree_of().trie.roots(), 5) == []
    deep = [(A, list(range(length))) for length in range(1, 3000)]
    shown = picture(tree_of(*deep).trie.roots(), 100)
    assert total(shown) == 2999
    assert len(shown) == 101
