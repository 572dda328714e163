"""Pins on a stand-in for SGLang's tree."""

from collections import Counter

from preble_sgl.runtime_ext.plugin.hints import Pin
from preble_sgl.runtime_ext.plugin.pinning import Pinning


class Tree:
    """Has every key whole, unless it is empty; counts the locks of each."""

    def __init__(self) -> None:
        self.locks: Counter[str] = Counter()

    def match_full_device_prefix(self, key: str) -> tuple[int, str, int]:
        return len(key), key, len(key)

    def inc_full_pin(self, node: str) -> None:
        self.locks[node] += 1

    def dec_full_pin(self, node: str) -> None:
        self.locks[node] -= 1
        assert self.locks[node] >= 0


def pinning(max_tokens: int = 100) -> tuple[Pinning, Tree, list[float]]:
    tree, now = Tree(), [0.0]
    return Pinning(tree, max_tokens, lambda: now[0]), tree, now


def test_a_pin_holds_until_it_expires() -> None:
    pins, tree, now = pinning()
    assert pins.pin(Pin("a", 5.0), "k" * 30) == 30
    assert pins.pin(Pin("b", 9.0), "l" * 30) == 30
    now[0] = 5.0
    pins.expire()
    assert pins.tokens_by_id == {"b": 30}
    assert +tree.locks == {"l" * 30: 1}


def test_a_pin_of_the_same_id_takes_its_place_and_its_room() -> None:
    pins, tree, _ = pinning(50)
    assert pins.pin(Pin("a", 5.0), "k" * 40) == 40
    assert pins.pin(Pin("a", 5.0), "l" * 45) == 45
    assert +tree.locks == {"l" * 45: 1}


def test_more_than_the_share_is_refused_and_so_is_what_is_not_cached() -> None:
    pins, tree, _ = pinning(50)
    assert pins.pin(Pin("a", 5.0), "k" * 30) == 30
    assert pins.pin(Pin("b", 5.0), "l" * 21) == 0
    assert pins.pin(Pin("c", 5.0), "") == 0
    assert pins.pin(Pin("d", 5.0), "l" * 20) == 20
    assert pins.pinned_tokens == 50
    pins.drop_all()
    assert not +tree.locks


def test_a_tree_that_was_thrown_away_is_not_touched_again() -> None:
    pins, tree, _ = pinning()
    pins.pin(Pin("a", 5.0), "k" * 30)
    tree.locks.clear()
    pins.forget()
    pins.unpin("a")
    assert pins.pinned_tokens == 0
