"""When requests or sessions arrive: instants in seconds after 0, none before the one before it."""

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, repeat
from math import isfinite

from preble_sgl.errors import InputError
from preble_sgl.sim.distributions import Quantiles
from preble_sgl.sim.workloads import AzureService

AZURE_GAPS: Mapping[AzureService, Quantiles] = {
    "code": Quantiles({0: 2e-6, 0.5: 0.0638, 0.9: 0.273, 0.99: 2.205, 0.999: 48.0, 1: 217.0}),
    "conv": Quantiles({0: 2e-6, 0.1: 0.019, 0.5: 0.1184, 0.9: 0.421, 0.99: 0.890, 0.999: 1.1, 1: 4.3}),
}
"""Seconds between arrivals in the Azure LLM inference traces of 2023: bursty code, almost Poisson talk.

Recorded: p50, p90, p99 and the ends. Chosen so that the recorded means (0.390 s, 0.181 s) come out: p99.9
and, for conversation, p10. The coefficients of variation become 11 and 1.15; recorded were 13.2 and 1.09.
"""


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Yield the instants of a Poisson process of `rate` per second. Raises InputError."""
    _check_positive("rate", rate)
    return accumulate(rng.expovariate(rate) for _ in repeat(None))


def gamma(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Yield instants `rate` per second apart, by gaps of coefficient of variation `cv`. Raises InputError.

    1 is Poisson, more is bursty, less is regular.
    """
    _check_positive("rate", rate)
    _check_positive("cv", cv)
    shape = cv**-2
    scale_s = 1 / (rate * shape)
    return accumulate(rng.gammavariate(shape, scale_s) for _ in repeat(None))


def azure(service: AzureService, rng: random.Random, rate: float | None = None) -> Iterator[float]:
    """Yield instants with the gaps of an Azure service, drawn independently; `rate` scales them.

    Unscaled: 2.6 per second for "code", 5.4 for "conv". Raises InputError.
    """
    gaps = AZURE_GAPS[service]
    scale = 1.0
    if rate is not None:
        _check_positive("rate", rate)
        scale = 1 / (rate * gaps.mean)
    return accumulate(scale * gaps.draw(rng) for _ in repeat(None))


def recorded(times: Iterable[float], stretch: float = 1.0) -> Iterator[float]:
    """Yield recorded instants in order, once, each times `stretch` (below 1: faster). Raises InputError."""
    _check_positive("stretch", stretch)
    ordered = sorted(times)
    for at in ordered:
        if not (isfinite(at) and at >= 0):
            raise InputError(f"recorded arrival {at}: must be 0 or more seconds; subtract the first")
    return (at * stretch for at in ordered)


def _check_positive(name: str, value: float) -> None:
    if not (isfinite(value) and value > 0):
        raise InputError(f"{name}={value}: must be above 0")
