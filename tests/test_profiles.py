"""Cost profiles: where they come from, the published numbers they give, and what a bad file is told."""

from pathlib import Path

import pytest

from preble_sgl.errors import InputError
from preble_sgl.profiles import load_profile, profile_names

A6000 = load_profile("a6000-mistral-7b")
H100 = load_profile("h100x4-llama3-70b")

GOOD = """
kind = "made up"
hardware = "none"
model = "none"
source = "this test"
error = "none"
kv_tokens = 1000
chunk_tokens = 100

[step]
floor_s = 0.01
base_s = 0.005
token_s = 0.001
"""


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_says_where_it_comes_from_and_how_far_off_it_is(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for text in (profile.kind, profile.hardware, profile.model, profile.source, profile.error):
        assert text.strip()
    assert profile.chunk_tokens <= profile.kv_tokens
    assert profile.step.seconds([(1000, 1000)]) > profile.step.seconds([], 1, 1000) > 0


def test_the_shipped_profiles_are_known_by_name() -> None:
    assert {"a6000-mistral-7b", "a100-mistral-7b", "h100x4-llama3-70b", "cpu-tiny"} <= set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_what_was_not_measured_says_so(name: str) -> None:
    profile = load_profile(name)
    assert ("measured" in profile.kind) or ("roofline" in profile.kind)
    if "roofline" in profile.kind:
        assert "not measured" in f"{profile.kind} {profile.error}"


@pytest.mark.parametrize(
    ("prompt_len", "published_ms"), [(512, 66.7), (1024, 128), (2048, 269), (4096, 553), (8192, 1183)]
)
def test_prebles_equations_for_a_cold_prompt_on_an_a6000(prompt_len: int, published_ms: float) -> None:
    assert A6000.step.seconds([(prompt_len, prompt_len)]) == pytest.approx(published_ms / 1000, rel=0.005)
    assert A6000.cost.prefill_s(prompt_len) == pytest.approx(published_ms / 1000, rel=0.005)


@pytest.mark.parametrize(("num_requests", "published_ms"), [(32, 38), (64, 52)])
def test_prebles_equations_for_a_decode_step_on_an_a6000(num_requests: int, published_ms: float) -> None:
    # published to two digits, for sequences of 2k
    step_s = A6000.step.decodes(1, num_requests, num_requests * 2048)
    assert step_s == pytest.approx(published_ms / 1000, abs=0.0006)


@pytest.mark.parametrize(
    ("new_len", "sequence_len", "published_ms"),
    [(512, 8192, 84.7), (2048, 8192, 217), (8192, 8192, 745), (28_232, 28_232, 2943)],
)
def test_the_fit_for_llama_70b_on_four_h100(new_len: int, sequence_len: int, published_ms: float) -> None:
    # c is the length of the sequence with the new tokens, so 512 at 8k have 7680 cached before them
    assert H100.step.seconds([(new_len, sequence_len)]) == pytest.approx(published_ms / 1000, rel=0.005)


def test_one_token_at_8k_is_within_the_error_that_the_h100_profile_states() -> None:
    measured_s = 0.0566
    assert H100.step.seconds([], 1, 8192) == pytest.approx(measured_s, rel=0.30)
    assert H100.step.seconds([(1, 8192)]) == pytest.approx(measured_s, rel=0.30)


def test_the_intercept_of_the_h100_profile_is_paid_once_for_a_batch() -> None:
    alone_s, many_s = (H100.step.decodes(1, num, num * 2048) for num in (1, 32))
    assert many_s < 32 * (alone_s - 0.018) + 0.02


@pytest.mark.parametrize("name", profile_names())
@pytest.mark.parametrize(("new_len", "context_len"), [(1, 0), (100, 0), (512, 4000), (4096, 4096)])
def test_engine_and_scheduler_price_one_prefill_alike(name: str, new_len: int, context_len: int) -> None:
    profile = load_profile(name)
    engine_s = profile.step.seconds([(new_len, context_len + new_len)])
    request_s = profile.step.request_s
    assert engine_s - request_s - 1e-9 <= profile.cost.prefill_s(new_len, context_len) <= engine_s + 1e-9


@pytest.mark.parametrize("name", profile_names())
def test_a_request_is_charged_its_share_of_the_usual_decode_step(name: str) -> None:
    profile = load_profile(name)
    num, context = (8, 512) if name == "cpu-tiny" else (32, 2048)
    step_s = profile.step.seconds([], num, num * context)
    assert profile.cost.decode_s(10) == pytest.approx(10 * step_s / num)


# Files


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_profile_can_come_from_a_file(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    assert (profile.name, profile.kv_tokens, profile.overhead_s) == ("mine", 1000, 0.0)
    assert profile.step.seconds([(10, 10)]) == pytest.approx(0.015)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"there is no profile b200: give one of a100-mistral-7b, .*toml"):
        load_profile("b200")


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no profile .*none\.toml"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GOOD + "watts = 300.0\n", "watts"),
        (GOOD.replace('kind = "made up"', 'kind = "made up"\nwatts = 300'), "watts"),
        (GOOD.replace("token_s = 0.001", ""), "token_s"),
        (GOOD.replace("kv_tokens = 1000", ""), "kv_tokens"),
        (GOOD.replace('error = "none"', ""), "error"),
        (GOOD.partition("[step]")[0], "step"),
        (GOOD.replace("kv_tokens = 1000", "kv_tokens = 0"), "kv_tokens"),
        (GOOD.replace("chunk_tokens = 100", "chunk_tokens = -1"), "chunk_tokens"),
        (GOOD.replace("token_s = 0.001", "token_s = -0.001"), "token_s=-0.001"),
        (GOOD.replace("token_s = 0.001", "token_s = nan"), "token_s=nan"),
        (GOOD.replace("token_s = 0.001", 'token_s = "fast"'), "token_s"),
        ("kind: made up", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_a_bad_file_is_one_line_that_says_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert str(path) in message
    assert complaint in message.removeprefix(f"profile {path}")
    assert "\n" not in message
