"""The prefix tree against a naive model: per worker, the plain list of the prefixes it was given."""

import random
from dataclasses import dataclass

import pytest

from preble_sgl.core import RequestId, WorkerId, token_ids
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.node import Node
from preble_sgl.global_sched.radix_tree import RadixTree

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")
R = [RequestId(f"r{i}") for i in range(9)]


def packed(*tokens: int) -> bytes:
    return token_ids(tokens).tobytes()


def make_tree(*workers: WorkerId, capacity: int = 10_000) -> RadixTree:
    tree = RadixTree(window_s=180.0)
    for worker_id in workers:
        tree.add_worker(worker_id, capacity=capacity)
    return tree


def shape(tree: RadixTree) -> list[object]:
    """Everything that can be seen in a tree."""
    return sorted(
        (
            (
                node.end_len,
                node.key,
                sorted(node.recent.items()),
                [
                    (w, s.computed, s.locks, s.num_children, s.last_used, tuple(s.claims))
                    for w, s in sorted(node.shares.items())
                ],
            )
            for node in tree.trie.nodes()
        ),
        key=repr,
    )


# Small stories


def test_a_match_reports_the_longest_prefix_of_each_worker() -> None:
    tree = make_tree(W0, W1, W2)
    tree.insert("", packed(1, 2, 3, 4, 5), W0)
    tree.insert("", packed(1, 2, 3, 9), W1)
    match = tree.match("", packed(1, 2, 3, 4, 7))
    assert match.lens == {W0: 4, W1: 3}
    assert match.known_len == 4
    assert match.len_on(W2) == 0


def test_a_match_inside_an_edge_does_not_split_it() -> None:
    tree = make_tree(W0)
    tree.insert("", packed(1, 2, 3, 4, 5), W0)
    before = shape(tree)
    assert tree.match("", packed(1, 2, 3)).lens == {W0: 3}
    assert shape(tree) == before
    assert tree.num_nodes == 1


def test_a_split_keeps_holders_claims_and_counts_on_both_halves() -> None:
    tree = make_tree(W0, W1)
    tail = tree.bind("", packed(1, 2, 3, 4), W0, R[0])
    tree.count_recent(tail, W0)
    tree.insert("", packed(1, 2, 9), W1)
    upper = tail.parent
    assert upper is not None
    assert (upper.num_tokens, tail.num_tokens, tail.end_len) == (2, 2, 4)
    assert [list(node.shares[W0].claims) for node in (upper, tail)] == [[R[0]], [R[0]]]
    assert upper.recent == tail.recent == {W0: 1}
    assert (tree.used_tokens(W0), tree.used_tokens(W1)) == (4, 3)
    tree.check_invariants()


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_split_falls_exactly_where_two_prompts_part(length: int, where: str) -> None:
    at = {"first": 1, "middle": 1 + length // 2, "last": length}[where]
    tree = make_tree(W0)
    ids = list(range(1, length + 2))
    tree.insert("", packed(*ids), W0)
    tree.insert("", packed(*ids[:at], 7777), W0)
    assert tree.match("", packed(*ids[:at], 8888)).lens == {W0: at}
    assert tree.used_tokens(W0) == length + 2
    tree.check_invariants()


def test_namespaces_share_nothing() -> None:
    tree = make_tree(W0)
    tree.insert("alice", packed(1, 2, 3), W0)
    assert tree.match("bob", packed(1, 2, 3)).lens == {}
    assert tree.match("alice", packed(1, 2, 3)).lens == {W0: 3}
    tree.insert("bob", packed(1, 2, 3), W0)
    assert tree.used_tokens(W0) == 6


def test_only_whole_pages_of_a_worker_match() -> None:
    tree = make_tree(W0)
    tree.add_worker(W1, capacity=100, page_size=4)
    for worker_id in (W0, W1):
        tree.insert("", packed(*range(1, 11)), worker_id)
    assert tree.used_tokens(W1) == 8
    assert tree.match("", packed(*range(1, 11))).lens == {W0: 10, W1: 8}
    assert tree.match("", packed(1, 2, 3, 4, 5, 6, 7, 99)).lens == {W0: 7, W1: 4}
    assert tree.match("", packed(1, 2, 99)).lens == {W0: 2, W1: 0}


def test_a_prompt_below_one_page_leaves_nothing() -> None:
    tree = make_tree()
    tree.add_worker(W1, capacity=100, page_size=4)
    tail = tree.bind("", packed(1, 2, 3), W1, R[0])
    tree.check_invariants()
    tree.insert("", packed(1, 2, 3, 4, 5), W1)
    tree.unlock(tail, W1)
    assert tree.match("", packed(1, 2, 3, 4, 5)).lens == {W1: 4}
    tree.check_invariants()


def test_pending_tokens_match_and_name_their_leader() -> None:
    tree = make_tree(W0)
    tree.bind("", packed(1, 2, 3, 4), W0, R[0])
    assert tree.match("", packed(1, 2, 3, 5)).lens == {W0: 3}
    tail = tree.bind("", packed(1, 2, 3, 5), W0, R[1])
    prospect = tree.prospect(tail, W0, R[1])
    assert (prospect.computed_len, prospect.awaited_len, prospect.leaders) == (0, 3, (R[0],))


def test_computed_tokens_are_awaited_by_nobody() -> None:
    tree = make_tree(W0)
    leader = tree.bind("", packed(1, 2, 3, 4), W0, R[0])
    follower = tree.bind("", packed(1, 2, 3, 5), W0, R[1])
    tree.mark_computed(leader, W0)
    prospect = tree.prospect(follower, W0, R[1])
    assert (prospect.computed_len, prospect.awaited_len, prospect.leaders) == (3, 0, ())


def test_releasing_a_leader_hands_its_claims_to_the_next() -> None:
    tree = make_tree(W0)
    leader = tree.bind("", packed(1, 2, 3, 4), W0, R[0])
    tree.bind("", packed(1, 2, 3, 5), W0, R[1])
    third = tree.bind("", packed(1, 2, 3, 6), W0, R[2])
    tree.release(leader, W0, R[0])
    assert tree.prospect(third, W0, R[2]).leaders == (R[1],)
    assert tree.used_tokens(W0) == 5
    tree.check_invariants()


def test_a_released_prompt_that_nobody_else_wants_disappears() -> None:
    tree = make_tree(W0)
    tree.release(tree.bind("", packed(1, 2, 3), W0, R[0]), W0, R[0])
    assert tree.num_nodes == 0
    assert tree.used_tokens(W0) == 0


def test_a_node_stays_while_a_recent_request_shares_it_and_goes_after() -> None:
    tree = make_tree(W0)
    tail = tree.insert("", packed(1, 2, 3), W0)
    tree.count_recent(tail, W0)
    tree.clear(W0)
    assert (tree.num_nodes, tree.used_tokens(W0)) == (1, 0)
    tree.discount_recent(tail, W0)
    assert tree.num_nodes == 0
    assert not tree.trie._roots


def test_forgetting_a_worker_keeps_what_others_hold() -> None:
    tree = make_tree(W0, W1)
    tree.count_recent(tree.insert("", packed(1, 2, 3), W0), W0)
    tree.insert("", packed(1, 2), W1)
    tree.forget_worker(W0)
    assert tree.match("", packed(1, 2, 3)).lens == {W1: 2}
    assert tree.num_nodes == 1
    with pytest.raises(UnknownIdError):
        tree.used_tokens(W0)


def test_bad_sizes_and_double_workers_are_refused() -> None:
    tree = make_tree(W0)
    with pytest.raises(InputError):
        tree.add_worker(W0, capacity=5)
    with pytest.raises(InputError):
        tree.add_worker(W1, capacity=0)
    with pytest.raises(UnknownIdError):
        tree.insert("", packed(1), W1)


# Random actions against the model


@dataclass
class Bound:
    request_id: RequestId
    worker_id: WorkerId
    namespace: str
    tokens: tuple[int, ...]
    tail: Node
    computed: bool = False


class Model:
    """What each worker has, as plain prefixes. `have[w]` holds every computed prefix, one entry per token."""

    def __init__(self, pages: dict[WorkerId, int]) -> None:
        self.pages = pages
        self.have: dict[WorkerId, set[tuple[object, ...]]] = {worker_id: set() for worker_id in pages}
        self.bound: list[Bound] = []
        self.recent: list[tuple[WorkerId, str, tuple[int, ...], Node]] = []

    def cut(self, worker_id: WorkerId, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens[: len(tokens) - len(tokens) % self.pages[worker_id]]

    def prefixes(
        self, worker_id: WorkerId, namespace: str, tokens: tuple[int, ...]
    ) -> set[tuple[object, ...]]:
        tokens = self.cut(worker_id, tokens)
        return {(namespace, *tokens[:n]) for n in range(1, len(tokens) + 1)}

    def holds(self, worker_id: WorkerId) -> set[tuple[object, ...]]:
        pending = (
            self.prefixes(worker_id, b.namespace, b.tokens) for b in self.bound if b.worker_id == worker_id
        )
        return self.have[worker_id].union(*pending)

    def match_len(self, worker_id: WorkerId, namespace: str, tokens: tuple[int, ...]) -> int:
        holds = self.holds(worker_id)
        length = next((n for n in range(len(tokens), 0, -1) if (namespace, *tokens[:n]) in holds), 0)
        return length - length % self.pages[worker_id]

    def num_recent(self, worker_id: WorkerId, namespace: str, prefix: tuple[int, ...]) -> int:
        return sum(
            (w, ns) == (worker_id, namespace) and self.cut(w, tokens)[: len(prefix)] == prefix
            for w, ns, tokens, _ in self.recent
        )


class Actions:
    """One random step on the tree and on the model."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.model = Model({W0: 1, W1: 1, W2: 3})
        self.tree = RadixTree(window_s=180.0)
        for worker_id, page_size in self.model.pages.items():
            self.tree.add_worker(worker_id, capacity=10_000, page_size=page_size)
        self.num_requests = 0

    def step(self) -> None:
        action = self.rng.choices(
            [self.insert, self.bind, self.compute, self.finish, self.release, self.expire, self.clear],
            [3, 6, 3, 3, 2, 2, 0.1],
        )[0]
        action()

    def key(self) -> tuple[str, tuple[int, ...]]:
        tokens = tuple(self.rng.choices([1, 2, 3], [8, 2, 1], k=self.rng.randint(1, 12)))
        return self.rng.choice(["", "other"]), tokens

    def insert(self) -> None:
        worker_id = self.rng.choice(list(self.model.pages))
        namespace, tokens = self.key()
        tail = self.tree.insert(namespace, packed(*tokens), worker_id)
        self.tree.count_recent(tail, worker_id)
        self.model.have[worker_id] |= self.model.prefixes(worker_id, namespace, tokens)
        self.model.recent.append((worker_id, namespace, tokens, tail))

    def bind(self) -> None:
        worker_id = self.rng.choice(list(self.model.pages))
        namespace, tokens = self.key()
        self.num_requests += 1
        request_id = RequestId(f"r{self.num_requests}")
        tail = self.tree.bind(namespace, packed(*tokens), worker_id, request_id)
        self.model.bound.append(Bound(request_id, worker_id, namespace, tokens, tail))

    def compute(self) -> None:
        for bound in self.some_bound():
            self.tree.mark_computed(bound.tail, bound.worker_id)
            bound.computed = True
            self.keep(bound, bound.tokens)

    def finish(self) -> None:
        for bound in self.some_bound():
            tokens = bound.tokens + self.key()[1]
            self.tree.insert(bound.namespace, packed(*tokens), bound.worker_id)
            self.tree.unlock(bound.tail, bound.worker_id)
            self.keep(bound, tokens)
            self.model.bound.remove(bound)

    def release(self) -> None:
        for bound in self.some_bound():
            self.tree.release(bound.tail, bound.worker_id, bound.request_id)
            self.model.bound.remove(bound)

    def expire(self) -> None:
        if self.model.recent:
            worker_id, _, _, tail = self.model.recent.pop(self.rng.randrange(len(self.model.recent)))
            self.tree.discount_recent(tail, worker_id)

    def clear(self) -> None:
        worker_id = self.rng.choice(list(self.model.pages))
        self.tree.clear(worker_id)
        self.model.have[worker_id].clear()
        self.model.bound = [bound for bound in self.model.bound if bound.worker_id != worker_id]

    def some_bound(self) -> list[Bound]:
        return [self.rng.choice(self.model.bound)] if self.model.bound else []

    def keep(self, bound: Bound, tokens: tuple[int, ...]) -> None:
        self.model.have[bound.worker_id] |= self.model.prefixes(bound.worker_id, bound.namespace, tokens)


@pytest.mark.parametrize("seed", range(6))
def test_the_tree_agrees_with_the_naive_model_after_every_random_step(seed: int) -> None:
    actions = Actions(seed)
    tree, model = actions.tree, actions.model
    for _ in range(250):
        actions.step()
        tree.check_invariants()
        namespace, tokens = actions.key()
        before = shape(tree)
        match = tree.match(namespace, packed(*tokens))
        for worker_id in model.pages:
            assert match.len_on(worker_id) == model.match_len(worker_id, namespace, tokens)
            assert tree.used_tokens(worker_id) == len(model.holds(worker_id))
        for node in match.path[:-1]:
            for worker_id in model.pages:
                expected = model.num_recent(worker_id, namespace, tokens[: node.end_len])
                assert node.recent.get(worker_id, 0) == expected
        assert shape(tree) == before
    for worker_id in model.pages:
        tree.forget_worker(worker_id)
    assert tree.num_nodes == 0
