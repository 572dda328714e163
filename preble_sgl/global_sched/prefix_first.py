"""Prefix first: requests that share a prefix nobody has computed yet wait for the first of them.

A runtime shares a prefix only once it is computed: siblings that arrive together each prefill it (SGLang's
fcfs order has no sharing inside a batch, lpm only in part). So whatever policy picked the worker, a request
that would find MIN_SHARED_LEN or more tokens merely *pending* there, because another request placed on the
same worker is going to compute them, is held until that leader reports its first token. When the leader
finishes, is cancelled or moved instead, its followers are looked at again, and the first becomes the leader.

Who leads is written in the prefix tree: each pending node names the requests that claimed it, in the order
in which they were bound, and the first leads. A request waits only for requests bound before it, so waiting
never goes round in a circle, and the earliest of them never waits.

    leader A: S+a    follower B: S+T+b    follower C: S+T+c        (S, T shared; A computes S)
    A's first token: S is there. B goes and leads T. C waits on, for B.
"""

from preble_sgl.core import RequestId

MIN_SHARED_LEN = 32
"""Pending tokens worth waiting for; SGLang's own in-batch check uses the same number."""


class Holds:
    """Which held request waits for which leaders."""

    __slots__ = ("_followers", "_leaders")

    def __init__(self) -> None:
        self._leaders: dict[RequestId, tuple[RequestId, ...]] = {}
        self._followers: dict[RequestId, set[RequestId]] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._leaders

    def __len__(self) -> int:
        return len(self._leaders)

    def hold(self, follower: RequestId, leaders: tuple[RequestId, ...]) -> None:
        """Make a request wait for its leaders, instead of those it waited for before."""
        self.free(follower)
        self._leaders[follower] = leaders
        for leader in leaders:
            self._followers.setdefault(leader, set()).add(follower)

    def free(self, follower: RequestId) -> None:
        """Let a request wait no longer; fine if it does not wait."""
        for leader in self._leaders.pop(follower, ()):
            self._followers[leader].discard(follower)
            if not self._followers[leader]:
                del self._followers[leader]

    def followers(self, leader: RequestId) -> frozenset[RequestId]:
        """Return the requests that wait for `leader`."""
        return frozenset(self._followers.get(leader, ()))

    def leaders(self, follower: RequestId) -> tuple[RequestId, ...]:
        """Return the requests that `follower` waits for."""
        return self._leaders.get(follower, ())
