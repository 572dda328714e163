"""Fitting: known costs are found again, noise does not mislead, and no cost is ever negative."""

import random
from collections.abc import Iterator

import pytest

from preble_sgl.errors import InputError
from preble_sgl.sim.fit import (
    COEFFICIENTS,
    Fit,
    Iteration,
    Sample,
    fit_costs,
    nonnegative_least_squares,
    prompt_iterations,
)
from preble_sgl.sim.step_cost import StepCost

CHUNK = 4096
LINE = StepCost(
    floor_s=0.001,
    base_s=0.002,
    token_s=2e-5,
    request_s=3e-4,
    prefill_s=0.001,
    context_s=3e-7,
    attention_sequence_s=5e-6,
    attention_pair_s=1e-9,
    attention_square_s=1.3e-8,
)
"""Like SGLang on a CPU: prefills recompute the attention of what is cached, and no floor shows."""
FLOOR = StepCost(floor_s=0.0074, base_s=0.001, token_s=3e-5, context_s=5e-8, attention_pair_s=7e-10)
"""Like a GPU: small iterations take as long as reading the weights."""


def iterations() -> Iterator[tuple[str, tuple[Iteration, ...]]]:
    """Yield the iterations of a calibration, with their kinds."""
    for length in (16, 64, 256, 512, 1024, 2048, 4096, 8192):
        yield "cold", prompt_iterations(length, 0, CHUNK)
    for cached in (256, 1024, 4096):
        for new in (1, 16, 64, 256, 1024):
            yield "hit", prompt_iterations(new, cached, CHUNK)
    for num in (4, 16):
        for length in (16, 64, 256):
            yield "together", (Iteration(prefills=((length, length),) * num),)
    for num in (1, 2, 4, 8, 16, 32):
        for context in (64, 1024, 4096):
            yield "decode", (Iteration(num_decodes=num, context=num * context),)


def seconds(cost: StepCost, parts: tuple[Iteration, ...]) -> float:
    return sum(cost.seconds(one.prefills, one.num_decodes, one.context) for one in parts)


def samples(cost: StepCost, overhead_s: float = 0.003, noise: float = 0.0) -> list[Sample]:
    """Return what would be measured of a server with these costs."""
    rng = random.Random(0)
    found = []
    for kind, parts in iterations():
        engine_s = seconds(cost, parts) * rng.uniform(1 - noise, 1 + noise)
        ttft_s = engine_s + overhead_s if kind in ("cold", "hit") else None
        found.append(Sample(kind=kind, iterations=parts, engine_s=engine_s, ttft_s=ttft_s))
    return found


def coefficients(cost: StepCost) -> dict[str, float]:
    return {name: getattr(cost, name) for name in COEFFICIENTS}


def worst(fit: Fit) -> float:
    return max(error.max for error in fit.errors().values())


def test_a_line_is_found_again_and_its_floor_is_its_shortest_iteration() -> None:
    fit = fit_costs(samples(LINE))
    shortest = {"floor_s": LINE.base_s + LINE.token_s + LINE.request_s}
    assert coefficients(fit.step) == pytest.approx(coefficients(LINE) | shortest, rel=1e-4)
    assert fit.overhead_s == pytest.approx(0.003)
    assert worst(fit) < 1e-4


def test_a_floor_is_found_again() -> None:
    fit = fit_costs(samples(FLOOR))
    assert coefficients(fit.step) == pytest.approx(coefficients(FLOOR), rel=1e-4, abs=1e-12)
    assert worst(fit) < 1e-4


@pytest.mark.parametrize("cost", [LINE, FLOOR])
def test_noise_of_five_percent_misleads_by_no_more_than_it_is(cost: StepCost) -> None:
    fit = fit_costs(samples(cost, noise=0.05))
    for _, parts in iterations():
        assert seconds(fit.step, parts) == pytest.approx(seconds(cost, parts), rel=0.05)


def test_errors_are_told_for_each_kind_and_of_the_ttft_where_there_is_one() -> None:
    found = samples(LINE)
    late = found[0]
    found[0] = Sample(
        kind="cold",
        iterations=late.iterations,
        engine_s=late.engine_s,
        ttft_s=late.engine_s + 0.003 + late.engine_s,
    )
    errors = fit_costs(found).errors()
    assert {kind: error.num_samples for kind, error in errors.items()} == {
        "cold": 8,
        "hit": 15,
        "together": 6,
        "decode": 18,
    }
    expected = late.engine_s / (2 * late.engine_s + 0.003)
    assert errors["cold"].max == pytest.approx(expected, rel=1e-3)
    assert errors["cold"].mean == pytest.approx(expected / 8, rel=1e-2)


def test_more_work_in_less_time_gives_no_negative_cost() -> None:
    backwards = [
        Sample(kind="decode", iterations=(Iteration(num_decodes=num, context=100 * num),), engine_s=1 / num)
        for num in range(1, 12)
    ]
    step = fit_costs(backwards).step
    assert min(coefficients(step).values()) >= 0
    assert (step.token_s, step.request_s, step.context_s) == (0, 0, 0)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="8 measured points cannot give 9 coefficients: measure more"):
        fit_costs(samples(LINE)[:8])


def test_a_prompt_is_cut_into_chunks_that_each_see_what_came_before() -> None:
    assert [one.prefills for one in prompt_iterations(9000, 100, 4096)] == [
        ((4096, 4196),),
        ((4096, 8292),),
        ((808, 9100),),
    ]
    assert [one.prefills for one in prompt_iterations(4096, 0, 4096)] == [((4096, 4096),)]


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_are_optimal_under_the_bound(seed: int) -> None:
    """At the optimum the gradient is zero along each positive x, and points upward along each zero x."""
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1) for _ in range(5)] for _ in range(12)]
    targets = [rng.gauss(0, 1) for _ in range(12)]
    x = nonnegative_least_squares(rows, targets)
    misses = [
        sum(a * b for a, b in zip(row, x, strict=True)) - target
        for row, target in zip(rows, targets, strict=True)
    ]
    for i, value in enumerate(x):
        slope = sum(row[i] * miss for row, miss in zip(rows, misses, strict=True))
        assert value >= 0
        assert slope == pytest.approx(0, abs=1e-9) if value else slope >= -1e-9


def test_equal_columns_do_not_break_it() -> None:
    assert sum(nonnegative_least_squares([[1.0, 1.0], [2.0, 2.0]], [3.0, 6.0])) == pytest.approx(3)
