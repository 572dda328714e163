"""Prefixes that one SGLang runtime keeps whatever else needs room. Runs in its scheduler process.

The engine model's counterpart is `sim/pins.py`: a share of the pool bounds what is pinned, a pin expires, and
none starves anybody.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preble_sgl.runtime_ext.plugin.hints import Pin


@dataclass(frozen=True, slots=True)
class _Held:
    """What a pin holds: a node of the tree, the tokens up to the root, and when it expires."""

    node_id: Any
    num_tokens: int
    expires_at: float


class Pinning:
    """The pins of one runtime. `tree` is SGLang's tree core; `clock` in seconds."""

    def __init__(self, tree: Any, max_tokens: int, clock: Callable[[], float]) -> None:
        self._tree = tree
        self._clock = clock
        self._pins: dict[str, _Held] = {}
        self.max_tokens = max_tokens

    @property
    def pinned_tokens(self) -> int:
        """Tokens that are pinned; prefixes that overlap count twice."""
        return sum(held.num_tokens for held in self._pins.values())

    @property
    def tokens_by_id(self) -> dict[str, int]:
        """Tokens by pin."""
        return {pin_id: held.num_tokens for pin_id, held in self._pins.items()}

    def pin(self, pin: Pin, key: Any) -> int:
        """Pin what is cached of a key, in place of an earlier pin of this id; return how many tokens.

        0, and no pin, if nothing is cached or the share would be exceeded.
        """
        self.unpin(pin.pin_id)
        matched_len, node_id, pinned_len = self._tree.match_full_device_prefix(key)
        if not matched_len or self.pinned_tokens + pinned_len > self.max_tokens:
            return 0
        self._tree.inc_full_pin(node_id)
        self._pins[pin.pin_id] = _Held(node_id, pinned_len, self._clock() + pin.expires_s)
        return int(pinned_len)

    def unpin(self, pin_id: str) -> None:
        """Let go of a pin, if there is one of this id."""
        held = self._pins.pop(pin_id, None)
        if held is not None:
            self._tree.dec_full_pin(held.node_id)

    def expire(self) -> None:
        """Let go of what has expired. O(pins)."""
        now = self._clock()
        for pin_id in [pin_id for pin_id, held in self._pins.items() if held.expires_at <= now]:
            self.unpin(pin_id)

    def drop_all(self) -> None:
        """Let go of every pin."""
        for pin_id in list(self._pins):
            self.unpin(pin_id)

    def forget(self) -> None:
        """Forget every pin, as the tree that held them was thrown away."""
        self._pins.clear()
