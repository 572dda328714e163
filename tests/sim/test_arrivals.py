"""Arrivals come at the rate, and as unevenly, as they say."""

import random
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from statistics import fmean, pstdev

import pytest

from preble_sgl.errors import InputError
from preble_sgl.sim.arrivals import azure, gamma, poisson, recorded
from preble_sgl.sim.workloads import AzureService

NUM = 100_000

Make = Callable[[random.Random], Iterator[float]]


def gaps(arrivals: Iterator[float], num: int = NUM) -> list[float]:
    """Return the seconds between the first arrivals, and before the first."""
    return [later - earlier for earlier, later in pairwise([0.0, *islice(arrivals, num)])]


def test_poisson_arrivals_have_the_rate_and_a_variation_of_1() -> None:
    seconds = gaps(poisson(4.0, random.Random(1)))
    assert fmean(seconds) == pytest.approx(0.25, rel=0.02)
    assert pstdev(seconds) / fmean(seconds) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_arrivals_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    seconds = gaps(gamma(4.0, cv, random.Random(1)))
    assert fmean(seconds) == pytest.approx(0.25, rel=0.05)
    assert pstdev(seconds) / fmean(seconds) == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(
    ("service", "mean_s", "p50", "p90", "p99", "longest"),
    [("code", 0.390, 0.0638, 0.273, 2.205, 217), ("conv", 0.181, 0.1184, 0.421, 0.890, 4.3)],
)
def test_azure_arrivals_have_the_recorded_quantiles_and_mean(
    service: AzureService, mean_s: float, p50: float, p90: float, p99: float, longest: float
) -> None:
    seconds = sorted(gaps(azure(service, random.Random(1))))
    assert seconds[NUM // 2] == pytest.approx(p50, rel=0.05)
    assert seconds[NUM * 9 // 10] == pytest.approx(p90, rel=0.05)
    assert seconds[NUM * 99 // 100] == pytest.approx(p99, rel=0.15)
    assert longest / 2 < seconds[-1] <= longest * 1.0001
    assert fmean(seconds) == pytest.approx(mean_s, rel=0.10)


def test_azure_code_is_bursty_and_conversation_is_not() -> None:
    """Recorded coefficients of variation: 13.2 and 1.09."""
    code, conv = (gaps(azure(service, random.Random(1))) for service in ("code", "conv"))
    assert pstdev(code) / fmean(code) == pytest.approx(13.2, rel=0.25)
    assert pstdev(conv) / fmean(conv) == pytest.approx(1.09, rel=0.10)


@pytest.mark.parametrize("service", ["code", "conv"])
def test_azure_arrivals_can_be_scaled_to_a_rate(service: AzureService) -> None:
    plain = list(islice(azure(service, random.Random(1)), 100))
    scaled = list(islice(azure(service, random.Random(1), rate=50.0), 100))
    ratio = scaled[0] / plain[0]
    assert scaled == pytest.approx([at * ratio for at in plain])
    assert fmean(gaps(azure(service, random.Random(1), rate=50.0))) == pytest.approx(1 / 50, rel=0.10)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: poisson(3.0, rng),
        lambda rng: gamma(3.0, 10.0, rng),
        lambda rng: azure("code", rng),
        lambda rng: azure("conv", rng, 7.0),
    ],
)
def test_arrivals_never_go_back_and_follow_the_seed(make: Make) -> None:
    first, second, other = (list(islice(make(random.Random(seed)), 1000)) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert first == sorted(first)
    assert first[0] >= 0


def test_recorded_arrivals_are_replayed_in_order_once() -> None:
    assert list(recorded([3.0, 1.0, 1.0, 2.0])) == [1.0, 1.0, 2.0, 3.0]
    assert list(recorded([10.0, 20.0], stretch=0.7)) == [7.0, 14.0]
    assert list(recorded([])) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rng: poisson(0, rng), "rate=0: must be above 0"),
        (lambda rng: poisson(float("inf"), rng), "rate=inf"),
        (lambda rng: gamma(1, 0, rng), "cv=0: must be above 0"),
        (lambda rng: azure("code", rng, -1.0), "rate=-1.0"),
        (lambda rng: recorded([1.0, -2.0]), r"arrival -2.0: must be 0 or more seconds; subtract the first"),
        (lambda rng: recorded([float("nan")]), "arrival nan"),
        (lambda rng: recorded([1.0], stretch=0), "stretch=0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make: Make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(random.Random(1))
