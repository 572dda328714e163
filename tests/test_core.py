"""The leaf types."""

import random

import pytest

from preble_sgl.core import (
    ProgramId,
    Request,
    SamplingParams,
    Usage,
    common_prefix_len,
    new_request_id,
    token_ids,
)


@pytest.mark.parametrize("seed", range(5))
def test_the_common_prefix_is_what_counting_finds(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        shared = rng.choices(range(2**31), k=rng.choice([0, 1, 31, 32, 33, 95, 96, 97, 500]))
        a = shared + rng.choices([1, 2, 3], k=rng.randint(0, 4))
        b = shared + rng.choices([1, 2, 3], k=rng.randint(0, 40))
        counted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_prefix_len(token_ids(a).tobytes(), token_ids(b).tobytes()) == counted


def test_request_ids_are_never_the_prefix_of_another() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(request_id) for request_id in ids} == {32}


def test_usage_adds_up() -> None:
    total = Usage(10, 4, 1) + Usage(5, 5, 2)
    assert total == Usage(15, 9, 3)
    assert total.computed_tokens == 6


@pytest.mark.parametrize(("prompt", "score_from"), [([], None), ([1, 2], 0), ([1, 2], 2)])
def test_impossible_requests_are_refused(prompt: list[int], score_from: int | None) -> None:
    with pytest.raises(ValueError, match=r"empty|score_from"):
        Request(
            request_id=new_request_id(),
            program_id=ProgramId("p"),
            call_path="p/call0",
            prompt=token_ids(prompt),
            sampling=SamplingParams(),
            score_from=score_from,
        )
