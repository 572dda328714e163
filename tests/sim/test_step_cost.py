"""The seconds of an iteration, by hand and by property."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_sgl.errors import InputError
from preble_sgl.sim.step_cost import StepCost

COST = StepCost(
    floor_s=5.0,
    base_s=1.0,
    token_s=0.1,
    request_s=0.5,
    context_s=0.001,
    attention_new_s=0.01,
    attention_sequence_s=0.002,
    attention_pair_s=0.0003,
    attention_square_s=0.00001,
    min_pairs=1000,
)
NAMES = list(COST.__dataclass_fields__)

second = st.floats(0, 10)
costs = st.builds(
    StepCost,
    floor_s=second,
    base_s=second,
    token_s=second,
    request_s=second,
    prefill_s=second,
    context_s=second,
    attention_new_s=second,
    attention_sequence_s=second,
    attention_pair_s=second,
    attention_square_s=second,
    min_pairs=st.integers(0, 10_000),
)
prefill = st.tuples(st.integers(1, 500), st.integers(0, 500)).map(lambda lens: (lens[0], lens[0] + lens[1]))


def test_prefills_and_decodes_make_one_sum() -> None:
    line_s = 1.0 + 0.1 * (40 + 8 + 10) + 0.5 * (2 + 10)
    context_s = 0.001 * (100 + 20 + 700)
    attention_s = 0.01 * 40 + 0.002 * 100 + 0.0003 * 40 * 100 + 0.00001 * 100 * 100  # 8 * 20 is too little
    seconds = COST.seconds([(40, 100), (8, 20)], 10, 700)
    assert seconds == pytest.approx(line_s + context_s + attention_s)


def test_the_line_does_not_fall_below_the_floor_and_context_comes_on_top() -> None:
    assert COST.seconds([(10, 10)]) == pytest.approx(5.0 + 0.01)
    assert COST.seconds([], 1, 100) == pytest.approx(5.0 + 0.1)


def test_the_intercept_is_paid_once_per_iteration_however_many_share_it() -> None:
    cost = StepCost(floor_s=0.0, base_s=7.0, token_s=0.1)
    assert cost.seconds([(10, 10)]) == pytest.approx(8.0)
    assert cost.seconds([(10, 10), (10, 10)], 30, 0) == pytest.approx(7.0 + 5.0)
    assert cost.decodes(1, 32, 32 * 2048) == pytest.approx(7.0 + 3.2)


def test_an_iteration_that_prefills_anything_pays_for_that_once() -> None:
    cost = StepCost(floor_s=0.0, base_s=1.0, token_s=0.0, prefill_s=0.25)
    assert cost.seconds([(10, 10), (20, 20)], 5, 100) == 1.25
    assert cost.seconds([], 5, 100) == cost.decodes(1, 5, 100) == 1.0


@pytest.mark.parametrize(("new_len", "counts"), [(10, False), (11, True)])
def test_attention_counts_beyond_min_pairs(new_len: int, counts: bool) -> None:
    assert (COST.attention(new_len, 100) > 0) == counts


def test_an_iteration_of_nothing_takes_no_time() -> None:
    assert COST.seconds([]) == 0.0
    assert COST.decodes(0, 5, 100) == 0.0


@settings(deadline=None, derandomize=True)
@given(costs, st.integers(1, 200), st.integers(1, 64), st.integers(0, 5000))
def test_many_decode_steps_take_as_long_as_each_of_them(
    cost: StepCost, num_steps: int, num_decodes: int, context: int
) -> None:
    each = [cost.seconds([], num_decodes, context + num_decodes * i) for i in range(num_steps)]
    assert cost.decodes(num_steps, num_decodes, context) == pytest.approx(sum(each), rel=1e-9)


@settings(deadline=None, derandomize=True)
@given(costs, st.lists(prefill, max_size=5), st.integers(0, 64), st.integers(0, 5000))
def test_more_work_never_takes_less_time_and_none_takes_negative_time(
    cost: StepCost, prefills: list[tuple[int, int]], num_decodes: int, context: int
) -> None:
    seconds = cost.seconds(prefills, num_decodes, context)
    assert seconds >= 0
    longer = [(new_len + 1, sequence_len + 1) for new_len, sequence_len in prefills]
    for more in (
        cost.seconds(longer, num_decodes, context),
        cost.seconds([*prefills, (1, 1)], num_decodes, context),
        cost.seconds(prefills, num_decodes + 1, context),
        cost.seconds(prefills, num_decodes, context + 1 if prefills or num_decodes else 0),
    ):
        assert more >= seconds * (1 - 1e-12)


@settings(deadline=None, derandomize=True)
@given(costs, st.integers(1, 100), st.integers(1, 64), st.integers(0, 5000))
def test_each_further_decode_step_takes_time(
    cost: StepCost, num_steps: int, num_decodes: int, context: int
) -> None:
    steps_s = [cost.decodes(n, num_decodes, context) for n in (num_steps, num_steps + 1)]
    assert steps_s[0] <= steps_s[1] * (1 + 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e-9, -1.0, float("nan")])
def test_no_coefficient_is_negative(name: str, value: float) -> None:
    fields = {"floor_s": 0.0, "base_s": 0.0, "token_s": 0.0} | {name: value}
    with pytest.raises(InputError, match=f"^step cost: {name}="):
        StepCost(**fields)  # type: ignore[arg-type]
