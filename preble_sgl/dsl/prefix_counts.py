"""How much of their prompts calls share, counted for one cache that never forgets.

The prompts form a prefix tree, and every token of the tree is computed once. The tree need not be built. In
sorted order, what a prompt adds to it is what lies beyond its common prefix with its predecessor, so one sort
and one pass give every count. What a call generates is in the cache, too, so outputs take part as prompts
that cost nothing. At least the last token of a prompt is always computed, and a scored prompt from where
scoring starts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from preble_sgl.core import TokenIds, common_prefix_len
from preble_sgl.dsl.tracer import MAX_HOLE_LEN, HoleLen, TracedCall

Key = Callable[[TokenIds], bytes]


def as_is(ids: TokenIds) -> bytes:
    """Return ids as bytes that sort by prefix: two generations are never the same."""
    return ids.tobytes()


def as_if_equal(ids: TokenIds) -> bytes:
    """Return ids as bytes, as if all generations said the same: then they share most."""
    data = ids.tobytes()
    if not has_holes(data):
        return data
    return type(ids)("i", [i if i >= 0 else -1 - (-1 - i) % MAX_HOLE_LEN for i in ids]).tobytes()


def has_holes(data: bytes) -> bool:
    """Return whether packed ids hold some that stand for tokens not generated yet."""
    return b"\xff" in data[3::4]


def reuse_limit(call: TracedCall) -> int:
    """Return the most prompt tokens of `call` that a runtime can take from its cache."""
    prompt_len = len(call.request.prompt)
    return min(prompt_len, call.request.score_from or prompt_len) - 1


def new_ranges(calls: Sequence[TracedCall], key: Key = as_is) -> Iterator[tuple[TracedCall, range]]:
    """Yield each call with the range of its prompt that no call before it in sorted order has. O(n log n)."""
    keyed = sorted(_entries(calls, key), key=lambda entry: entry[0])
    previous = b""
    for packed, call in keyed:
        shared = common_prefix_len(previous, packed)
        previous = packed
        if call is not None:
            yield call, range(min(shared, reuse_limit(call)), len(call.request.prompt))


class Prompts:
    """Prompts and generations of some calls, to be asked what another call shares with them."""

    def __init__(self, calls: Iterable[TracedCall], key: Key = as_is) -> None:
        self._key = key
        entries = sorted(
            ((packed, id(call)) for call in calls for packed, _ in _entries((call,), key)),
            key=lambda entry: entry[0],
        )
        self._packed = [packed for packed, _ in entries]
        self._owners = [owner for _, owner in entries]

    def shared_len(self, call: TracedCall) -> int:
        """Return how many tokens of a call's prompt a call other than itself has. O(log n)."""
        packed = self._key(call.request.prompt)
        place = bisect_left(self._packed, packed)
        sides = (range(place, len(self._packed)), range(place - 1, -1, -1))
        nearest = (next((i for i in side if self._owners[i] != id(call)), None) for side in sides)
        shared = (common_prefix_len(packed, self._packed[i]) for i in nearest if i is not None)
        return min(max(shared, default=0), reuse_limit(call))


def _entries(calls: Iterable[TracedCall], key: Key) -> Iterator[tuple[bytes, TracedCall | None]]:
    for call in calls:
        yield key(call.request.prompt), call
        if len(call.output) > 1:  # the last token generated has no KV
            yield key(call.request.prompt + call.output[:-1]), None


def length_bounds(ids: TokenIds, holes: Sequence[HoleLen]) -> tuple[int, int]:
    """Return how few and how many tokens a stretch of a prompt can have, its holes included."""
    data = ids.tobytes()
    if not has_holes(data):
        return len(ids), len(ids)
    lower = upper = 0
    place = 0
    while place < len(ids):
        if ids[place] >= 0:
            lower, upper, place = lower + 1, upper + 1, place + 1
            continue
        number, start = divmod(-1 - ids[place], MAX_HOLE_LEN)
        hole = holes[number]
        rest = min(hole.expected - start, len(ids) - place)
        is_whole = rest == hole.expected
        lower += min(hole.lower, rest)
        upper += hole.upper if is_whole else rest
        place += max(1, rest)
    return lower, upper
