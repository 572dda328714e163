"""One engine, as stories: what it computes when, what it caches, and what it answers."""

from typing import Any

import pytest

from preble_sgl.core import RequestId
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import EngineLoad
from preble_sgl.sim.step_cost import StepCost
from tests.sim.engines import (
    STEP_SECOND,
    TOKEN_SECOND,
    cached_tokens,
    engine,
    output_of,
    request,
    run,
    run_until,
    step,
    steps,
    submit,
)

COST = StepCost(
    floor_s=0.01, base_s=1.0, token_s=0.1, request_s=0.05, context_s=0.001, attention_pair_s=0.0001
)


READ_SECOND = StepCost(floor_s=0.0, base_s=0.0, token_s=0.0, context_s=1.0)
"""Every token of KV that is read takes a second."""


def two_behind_a_prefix(*, shared: bool) -> tuple[Engine, float]:
    """Return an engine about to decode two requests that share 10 of 11 prompt tokens, and the time."""
    one = engine(READ_SECOND, shared_prefix=shared)
    submit(one, "first", range(10), 1)
    run(one)
    for name in ("a", "b"):
        submit(one, name, [*range(10), 100 + ord(name)], 4)
    assert one.start(0.0) is not None
    return one, one.finish().ended_at


@pytest.mark.parametrize(("shared", "read"), [(False, 2 * 12), (True, 10 + 2 * 2)])
def test_a_shared_prefix_is_read_once_if_the_runtime_can(shared: bool, read: int) -> None:
    one, now = two_behind_a_prefix(shared=shared)
    assert one.start(now, max_decode_steps=1) == now + read


@pytest.mark.parametrize("shared", [False, True])
def test_a_stretch_of_steps_reads_what_single_steps_read(shared: bool) -> None:
    at_once, now = two_behind_a_prefix(shared=shared)
    singly, _ = two_behind_a_prefix(shared=shared)
    (*_, last) = steps(at_once, now)
    (*_, last_single) = steps(singly, now, max_decode_steps=1)
    assert last.ended_at == last_single.ended_at


def first_tokens(one: Engine, now: float = 0.0) -> list[list[str]]:
    """Run to the end; return whose first token came with each iteration."""
    return [[str(name) for name in result.first_tokens] for result in steps(one, now, max_decode_steps=1)]


def num_output(one: Engine, name: str) -> int:
    return one.output_len(RequestId(name))


# Prefill and decode


def test_what_waits_is_prefilled_before_anything_decodes() -> None:
    one = engine()
    submit(one, "a", range(10))
    assert step(one, 0.0)
    submit(one, "b", range(100, 110), now=1.0)
    result = step(one, 1.0)
    assert result is not None
    assert result.first_tokens == ["b"]
    assert (num_output(one, "a"), num_output(one, "b")) == (1, 1)
    step(one, 2.0, max_decode_steps=1)
    assert (num_output(one, "a"), num_output(one, "b")) == (2, 2)


def test_a_batch_of_prefills_takes_what_the_step_cost_says() -> None:
    one = engine(COST)
    submit(one, "a", range(10), 1)
    submit(one, "b", range(100, 120), 1)
    attention_s = 0.0001 * (10 * 10 + 20 * 20)
    assert one.start(5.0) == pytest.approx(5.0 + 1.0 + 0.1 * 30 + 0.05 * 2 + 0.001 * 30 + attention_s)
    one.finish()
    submit(one, "c", range(15), 1)
    cached_s = one.start(10.0)
    assert cached_s == pytest.approx(10.0 + 1.0 + 0.1 * 5 + 0.05 + 0.001 * 15 + 0.0001 * 5 * 15)


def test_a_decode_step_reads_all_context_with_the_tokens_it_adds() -> None:
    one = engine(COST)
    submit(one, "a", range(10))
    submit(one, "b", range(100, 120))
    step(one, 0.0)
    assert one.start(0.0, max_decode_steps=1) == pytest.approx(1.0 + 0.1 * 2 + 0.05 * 2 + 0.001 * (11 + 21))
    one.finish()
    assert one.start(0.0, max_decode_steps=1) == pytest.approx(1.0 + 0.1 * 2 + 0.05 * 2 + 0.001 * (12 + 22))


def test_the_first_token_comes_with_the_end_of_the_prefill_and_then_one_with_each_step() -> None:
    one = engine(TOKEN_SECOND)
    submit(one, "a", range(10), 4)
    assert [result.ended_at for result in steps(one, max_decode_steps=1)] == [10, 11, 12, 13]
    submit(one, "b", range(100, 105), 4, now=20.0)
    [finished] = run(one, 20.0)
    assert (finished.submitted_at, finished.first_token_at, finished.finished_at) == (20, 25, 28)
    assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (5, 4)


@pytest.mark.parametrize(("prompt_len", "num_iterations"), [(10, 1), (11, 2), (35, 4), (40, 4), (41, 5)])
def test_a_long_prompt_takes_one_iteration_per_chunk(prompt_len: int, num_iterations: int) -> None:
    one = engine(chunk_tokens=10)
    submit(one, "a", range(prompt_len), 1)
    [finished] = run(one)
    assert finished.first_token_at == num_iterations
    assert one.load().prefilled_tokens == prompt_len


def test_others_wait_for_a_chunked_prompt_and_share_its_last_iteration() -> None:
    one = engine(chunk_tokens=10)
    submit(one, "long", range(35), 1)
    submit(one, "a", range(100, 104), 1)
    submit(one, "b", range(200, 204), 1)
    assert first_tokens(one) == [[], [], [], ["long", "a"], ["b"]]


@pytest.mark.parametrize(("mixed_chunk", "num_decoded"), [(False, 1), (True, 5)])
def test_decodes_stall_during_a_chunked_prefill_unless_chunks_are_mixed(
    mixed_chunk: bool, num_decoded: int
) -> None:
    one = engine(chunk_tokens=10, mixed_chunk=mixed_chunk)
    submit(one, "a", range(100, 105), 20)
    step(one, 0.0)
    submit(one, "long", range(35))
    for now in range(4):
        assert num_output(one, "long") == 0
        step(one, now)
    assert num_output(one, "long") == 1
    assert num_output(one, "a") == num_decoded


def test_a_mixed_iteration_is_one_iteration_of_prefill_and_decodes() -> None:
    one = engine(COST, mixed_chunk=True)
    submit(one, "a", range(100, 110), 20)
    step(one, 0.0)
    submit(one, "b", range(20))
    mixed_s = 1.0 + 0.1 * (20 + 1) + 0.05 * 2 + 0.001 * (20 + 11) + 0.0001 * 20 * 20
    assert one.start(0.0) == pytest.approx(mixed_s)


def test_no_more_run_at_once_than_max_running() -> None:
    one = engine(max_running=2, order="fcfs")
    for number, name in enumerate("abcd"):
        submit(one, name, range(100 * number, 100 * number + 5), 3)
    assert first_tokens(one) == [["a", "b"], [], [], ["c", "d"], [], []]


# The cache


@pytest.mark.parametrize(
    ("page_size", "prompt_len", "cached"), [(1, 10, 9), (1, 1, 0), (16, 40, 32), (16, 33, 32), (16, 32, 16)]
)
def test_a_repeated_prompt_is_cached_but_for_its_last_token_in_whole_pages(
    page_size: int, prompt_len: int, cached: int
) -> None:
    one = engine(page_size=page_size)
    for name in "ab":
        submit(one, name, range(prompt_len))
        [finished] = run(one)
    assert finished.usage.cached_tokens == cached


def test_prompt_and_output_are_cached_but_for_the_last_token_that_was_generated() -> None:
    one = engine()
    submit(one, "a", range(10), 5)
    run(one)
    submit(one, "b", [*range(10), *output_of("a", 5), 7])
    assert cached_tokens(run(one)) == {"b": 14}
    assert one.cache.num_cached == 14 + 2 + 3


def test_a_prompt_in_prefill_is_cached_chunk_by_chunk() -> None:
    one = engine(chunk_tokens=16)
    submit(one, "a", range(40))
    step(one, 0.0)
    assert one.cache.num_cached == one.cache.num_locked == 16


def test_no_output_asked_for_fills_the_cache_and_has_no_first_token() -> None:
    one = engine(TOKEN_SECOND)
    submit(one, "a", range(10), 0)
    [result] = steps(one)
    [finished] = result.finished
    assert result.first_tokens == []
    assert (finished.first_token_at, finished.finished_at, finished.usage.output_tokens) == (None, 10, 0)
    submit(one, "b", range(20))
    assert cached_tokens(run(one)) == {"b": 10}


def test_namespaces_do_not_share() -> None:
    one = engine()
    for name, namespace in [("a", ""), ("b", "x"), ("c", "x")]:
        submit(one, name, range(10), namespace=namespace)
        [finished] = run(one)
        assert finished.usage.cached_tokens == (9 if name == "c" else 0)


@pytest.mark.parametrize("order", ["lpm", "fcfs"])
def test_two_equal_prompts_may_still_be_computed_twice_in_one_batch(order: str) -> None:
    one = engine(order=order)
    submit(one, "a", range(40))
    submit(one, "b", range(40))
    assert cached_tokens(run(one)) == {"a": 0, "b": 0}
    assert one.load().prefilled_tokens == 80
    assert one.cache.num_cached == 40 + 3 + 3


@pytest.mark.parametrize(
    ("order", "batches", "cached"),
    [
        ("lpm", [["a", "other"], ["twin"]], {"a": 0, "other": 0, "twin": 39}),
        ("fcfs", [["a", "twin"], ["other"]], {"a": 0, "other": 0, "twin": 0}),
    ],
)
def test_lpm_lets_a_twin_wait_so_that_it_finds_what_the_first_computes(
    order: str, batches: list[list[str]], cached: dict[str, int]
) -> None:
    one = engine(order=order, chunk_tokens=80)
    submit(one, "a", range(40), 1)
    submit(one, "twin", range(40), 1)
    submit(one, "other", range(100, 140), 1)
    results = list(steps(one))
    assert [[str(name) for name in result.first_tokens] for result in results] == batches
    assert cached_tokens([one for result in results for one in result.finished]) == cached


def test_flush_is_refused_while_anything_waits_or_runs() -> None:
    one = engine()
    submit(one, "a", range(10))
    assert not one.flush_cache()
    one.start(0.0)
    assert not one.flush_cache()
    one.finish()
    assert not one.flush_cache()
    run(one, 1.0)
    assert one.flush_cache()
    submit(one, "b", range(10))
    assert cached_tokens(run(one)) == {"b": 0}


# What it refuses


def test_a_prompt_that_cannot_fit_is_rejected_and_the_engine_lives_on() -> None:
    one = engine(kv_tokens=100)
    assert one.max_input_len == 98
    with pytest.raises(
        RequestRejected, match=r"call a: a prompt of 99 tokens is longer than the 98"
    ) as caught:
        submit(one, "a", range(99))
    assert (caught.value.request_id, caught.value.program_id, caught.value.call_path) == ("a", "a", "a")
    assert not one.has_work
    submit(one, "a", range(98), 1)
    assert [finished.usage.output_tokens for finished in run(one)] == [1]


def test_a_configured_longest_prompt_rejects_what_would_fit() -> None:
    one = engine(max_input_len=20)
    with pytest.raises(RequestRejected):
        submit(one, "a", range(21))
    submit(one, "a", range(20), 1)


@pytest.mark.parametrize(("page_size", "fits"), [(1, 98), (16, 79)])
def test_output_is_cut_to_what_fits_beside_the_prompt(page_size: int, fits: int) -> None:
    one = engine(kv_tokens=100, page_size=page_size)
    submit(one, "a", range(fits - 8), 50)
    [finished] = run(one)
    assert finished.usage.output_tokens == 9


def test_output_is_cut_to_what_was_asked_for() -> None:
    one = engine()
    one.submit(request("a", range(10), 3), output_of("a", 100), 0.0)
    [finished] = run(one)
    assert finished.usage.output_tokens == 3


def test_an_id_is_free_again_once_its_request_has_ended() -> None:
    one = engine()
    submit(one, "a", range(10))
    with pytest.raises(InputError, match="duplicate request id a"):
        submit(one, "a", range(20))
    run(one)
    submit(one, "a", range(20))
    assert cached_tokens(run(one)) == {"a": 10}


@pytest.mark.parametrize(
    "setting",
    [
        {"kv_tokens": 0},
        {"kv_tokens": 63, "page_size": 16},
        {"page_size": 0},
        {"max_prefill_tokens": 0},
        {"max_running": 0},
        {"chunk_tokens": 0},
        {"chunk_tokens": 15, "page_size": 16},
        {"max_input_len": 0},
        {"publish_every": 0},
        {"max_pinned_share": -0.1},
        {"max_pinned_share": 1.1},
        {"max_pinned_share": float("nan")},
        {"order": "lifo"},
    ],
    ids=str,
)
def test_a_bad_setting_is_an_input_error(setting: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"step": STEP_SECOND, "kv_tokens": 1000}
    with pytest.raises(InputError, match=r"^engine: ") as caught:
        EngineConfig(**settings | setting)
    assert "\n" not in str(caught.value)


# Load


def test_load_counts_what_runs_what_waits_and_what_is_held() -> None:
    one = engine(kv_tokens=200, chunk_tokens=40, order="fcfs")
    submit(one, "a", range(10), 20)
    submit(one, "long", range(100, 170), 5)
    submit(one, "b", range(300, 325), 5)
    assert one.load() == EngineLoad(0, 3, 105, 0, 200, 0, 0.0)
    step(one, 0.0)  # a, and 30 tokens of long
    assert one.load() == EngineLoad(2, 1, 25, 40, 200, 40, 1.0)
    one.start(1.0)  # 40 more; long has room for all of them
    assert one.load() == EngineLoad(2, 1, 25, 80, 200, 80, 2.0)
    one.finish()
    assert one.load() == EngineLoad(3 - 1, 1, 25, 80, 200, 80, 2.0)
    step(one, 2.0)
    assert one.load() == EngineLoad(3, 0, 0, 105, 200, 105, 3.0)
    step(one, 3.0, max_decode_steps=1)
    assert one.load().used_tokens == 108
    run(one, 4.0)
    assert one.load() == EngineLoad(0, 0, 0, 0, 200, 105, 3.0)


def test_load_counts_what_is_being_prefilled() -> None:
    one = engine()
    submit(one, "a", range(10))
    submit(one, "b", range(100, 110))
    one.start(0.0)
    load = one.load()
    assert (load.num_running, load.num_waiting, load.used_tokens) == (2, 0, 20)


def test_nothing_to_do_is_none() -> None:
    one = engine()
    assert one.start(0.0) is None
    assert not one.is_running
    submit(one, "a", range(3), 3)
    assert [finished.request_id for finished in run_until(one, 100.0)] == ["a"]
    assert one.start(100.0) is None
