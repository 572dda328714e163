"""Which group the next request belongs to: the tool, problem, video or document whose prefix it shares.

`Turnover`: some groups at a time, each asked its number of times and then replaced. Group sizes come out
exactly as drawn, which is what Preble's Table 1 records. `Ranked`: a fixed set of groups, drawn by Zipf's law
or evenly, which is what Preble's experiments send; the ranking may shift.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import TypeAlias

from preble_sgl.core import TokenIds
from preble_sgl.errors import InputError
from preble_sgl.sim.distributions import Distribution, draw_len

Group: TypeAlias = tuple[int, TokenIds]
"""Number and prefix of a group."""


@dataclass(frozen=True, slots=True)
class Turnover:
    """`num` groups under discussion at a time, drawn evenly; each is asked `requests` times, then dropped."""

    num: int
    requests: Distribution

    def __post_init__(self) -> None:
        _check_num(self.num)

    def draw(self, rng: random.Random, prefixes: Iterator[TokenIds]) -> Iterator[Group]:
        """Yield the group of each request. Holds `num` prefixes."""
        groups = enumerate(prefixes)
        current = list(islice(groups, self.num))
        left = [draw_len(self.requests, rng) for _ in current]
        while True:
            slot = rng.randrange(self.num)
            yield current[slot]
            left[slot] -= 1
            if not left[slot]:
                current[slot], left[slot] = next(groups), draw_len(self.requests, rng)


@dataclass(frozen=True, slots=True)
class Ranked:
    """`num` groups; the one at rank r is drawn in proportion to r ** -`zipf`, so 0 draws them evenly.

    After every `shift_every` requests the ranks are dealt anew.
    """

    num: int
    zipf: float = 0.0
    shift_every: int | None = None

    def __post_init__(self) -> None:
        _check_num(self.num)
        if self.shift_every is not None and self.shift_every < 1:
            raise InputError(f"shift_every={self.shift_every}: must be 1 or more requests, or None")

    def draw(self, rng: random.Random, prefixes: Iterator[TokenIds]) -> Iterator[Group]:
        """Yield the group of each request. Holds `num` prefixes."""
        ranking = list(islice(enumerate(prefixes), self.num))
        weights = list(accumulate(rank**-self.zipf for rank in range(1, self.num + 1)))
        for number in count(1):
            yield rng.choices(ranking, cum_weights=weights)[0]
            if self.shift_every is not None and number % self.shift_every == 0:
                rng.shuffle(ranking)


Popularity: TypeAlias = Turnover | Ranked
"""How requests spread over groups."""


def _check_num(num: int) -> None:
    if num < 1:
        raise InputError(f"num={num}: a workload needs 1 group or more")
