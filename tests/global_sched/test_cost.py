"""Cost profiles: the published numbers, and the shape that every cost must have."""

import pytest

from preble_sgl.errors import InputError
from preble_sgl.global_sched import CostProfile
from preble_sgl.global_sched.cost import with_shared_prefix
from preble_sgl.profiles import load_profile
from tests.global_sched.stories import A6000_MISTRAL_7B, CPU_TINY


@pytest.mark.parametrize(
    ("new_len", "milliseconds"), [(512, 66.7), (1024, 128), (2048, 269), (4096, 553), (8192, 1183)]
)
def test_a6000_prefill_agrees_with_the_published_table(new_len: int, milliseconds: float) -> None:
    assert A6000_MISTRAL_7B.prefill_s(new_len) * 1000 == pytest.approx(milliseconds, rel=0.004)


@pytest.mark.parametrize(
    ("new_len", "milliseconds"),
    [(16, 6.86), (64, 6.45), (256, 11.8), (512, 22.5), (1024, 45.6), (2048, 116.3), (4096, 341.1)],
)
def test_cpu_prefill_agrees_with_the_measured_times_to_first_token(new_len: int, milliseconds: float) -> None:
    ttft_s = load_profile("cpu-tiny").overhead_s + CPU_TINY.prefill_s(new_len)
    assert ttft_s * 1000 == pytest.approx(milliseconds, rel=0.15)


def test_short_prefills_cost_the_floor() -> None:
    assert A6000_MISTRAL_7B.batch_s(1) == A6000_MISTRAL_7B.batch_s(100) == pytest.approx(0.0246, abs=1e-4)
    assert CPU_TINY.batch_s(1) == pytest.approx(0.002128 + 0.001366)


def test_nothing_to_prefill_costs_nothing() -> None:
    assert A6000_MISTRAL_7B.prefill_s(0, 5000) == A6000_MISTRAL_7B.batch_s(0) == 0.0


def test_attention_makes_a_long_context_dearer() -> None:
    extra_s = A6000_MISTRAL_7B.prefill_s(2048, 6144) - A6000_MISTRAL_7B.prefill_s(2048)
    assert extra_s * 1000 == pytest.approx((1.936e-3 * 6144 + 2.19e-6 * 2048 * 6144) / 0.9, rel=1e-5)


def test_batching_prompts_shares_the_floor() -> None:
    assert CPU_TINY.batch_s(2 * 50) < 2 * CPU_TINY.batch_s(50)


def test_decode_is_linear_in_the_output() -> None:
    assert CPU_TINY.decode_s(8) == pytest.approx(0.00482, rel=1e-2)
    assert A6000_MISTRAL_7B.decode_s(32) == pytest.approx(0.0382, rel=1e-3)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(InputError):
        CostProfile(name="bad", source="", floor_s=0.0, base_s=-1.0, token_s=0.0, decode_token_s=0.0)


def test_a_prefix_that_is_read_once_makes_decoding_beside_siblings_cheaper() -> None:
    assert A6000_MISTRAL_7B.shared_s(1000, 50) == 0.0
    shared = with_shared_prefix(A6000_MISTRAL_7B)
    assert shared.shared_s(1000, 50) == pytest.approx(A6000_MISTRAL_7B.context_s * 1000 * 50)
    assert with_shared_prefix(A6000_MISTRAL_7B) is shared, "one object, as policies compare by identity"
