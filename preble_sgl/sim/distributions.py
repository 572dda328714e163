"""What lengths, pauses and gaps are drawn from: a mean and a deviation, or the quantiles of a recording."""

import random
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, log, sqrt
from typing import Protocol

from preble_sgl.errors import InputError


class Distribution(Protocol):
    """Something that numbers are drawn from."""

    def draw(self, rng: random.Random) -> float:
        """Return one number."""
        ...


def draw_len(distribution: Distribution, rng: random.Random) -> int:
    """Return a whole number of at least 1, for things that must not be empty."""
    return max(1, round(distribution.draw(rng)))


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same number."""

    value: float

    def draw(self, rng: random.Random) -> float:
        """Return the number."""
        return self.value


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution, clipped: what falls outside `low`…`high` counts as the bound."""

    mean: float
    sd: float
    low: float = 0.0
    high: float = inf

    def draw(self, rng: random.Random) -> float:
        """Return one number."""
        return min(self.high, max(self.low, rng.gauss(self.mean, self.sd)))


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal distribution by its mean and deviation before clipping to `low`…`high`."""

    mean: float
    sd: float
    low: float = 0.0
    high: float = inf

    def draw(self, rng: random.Random) -> float:
        """Return one number."""
        variance = log(1 + (self.sd / self.mean) ** 2)
        value = exp(rng.gauss(log(self.mean) - variance / 2, sqrt(variance)))
        return min(self.high, max(self.low, value))


class Quantiles:
    """Known quantiles; between two of them the logarithm grows linearly with the probability."""

    def __init__(self, values: Mapping[float, float]) -> None:
        """Take values by their probabilities, which rise from 0 to 1 as the values rise from above 0."""
        self._at, self._values = list(values), list(values.values())
        if self._at[:1] + self._at[-1:] != [0, 1] or self._values[0] <= 0:
            raise InputError("quantiles: must reach from probability 0 to 1, with values above 0")
        if any(low >= high for known in (self._at, self._values) for low, high in pairwise(known)):
            raise InputError("quantiles: probabilities and values must both rise from one to the next")
        self._growth = [log(high / low) for low, high in pairwise(self._values)]
        self._width = [high - low for low, high in pairwise(self._at)]

    def draw(self, rng: random.Random) -> float:
        """Return one number, by inverting the distribution function. O(log quantiles)."""
        chance = rng.random()
        i = bisect_right(self._at, chance) - 1
        return self._values[i] * exp(self._growth[i] * (chance - self._at[i]) / self._width[i])

    @property
    def mean(self) -> float:
        """The exact mean of what `draw` returns: (b - a) / ln(b / a) on each stretch from a to b."""
        rises = (high - low for low, high in pairwise(self._values))
        return sum(w * rise / g for w, rise, g in zip(self._width, rises, self._growth, strict=True))
