"""One engine short of memory: who is admitted, who gives way, what stays cached, what pins may hold."""

import pytest

from preble_sgl.core import RequestId
from preble_sgl.sim.engine import Engine
from tests.sim.engines import (
    cached_tokens,
    engine,
    output_of,
    pack,
    run,
    run_until,
    step,
    steps,
    submit,
)

# Every iteration takes a second, so instants count iterations.


def after_decoding(num_steps: int, limit_len: int = 700) -> tuple[Engine, float]:
    """Return an engine of 1000 tokens in which `a`, a prompt of 10, made so many decode steps; and now."""
    one = engine(order="fcfs")
    submit(one, "a", range(10), limit_len)
    run_until(one, 1.0 + num_steps)
    return one, 1.0 + num_steps


def num_output(one: Engine, name: str) -> int:
    return one.output_len(RequestId(name))


# Admission


def test_the_first_that_does_not_fit_stops_the_queue() -> None:
    one = engine(kv_tokens=100, order="fcfs")
    submit(one, "a", range(10), 50)
    submit(one, "b", range(100, 160), 10)  # needs 70, there are 100 - 10 - 50
    submit(one, "c", range(200, 205), 1)  # would fit
    result = step(one, 0.0)
    assert result is not None
    assert result.first_tokens == ["a"]
    assert one.load().num_waiting == 2
    finished = {one.request_id: one for one in run(one, 1.0)}
    assert finished[RequestId("a")].finished_at == 50
    assert finished[RequestId("b")].first_token_at == finished[RequestId("c")].first_token_at == 51


@pytest.mark.parametrize(
    ("num_steps", "room"),
    [
        (0, 500),  # 990 free, 699 tokens to come, of which 0.7 are expected: 500.7 left
        (300, 530),  # 690 free, 399 to come, 0.399: 530.8
        (600, 380),  # 390 free, 99 to come, 0.098: 380.3
        (650, 335),  # 340 free, 49 to come, 0.098 still: 335.2
    ],
)
def test_what_is_reserved_for_those_that_run_decays_from_step_to_step(num_steps: int, room: int) -> None:
    for need_len, is_admitted in [(room, True), (room + 1, False)]:
        one, now = after_decoding(num_steps)
        submit(one, "b", range(100, 100 + need_len - 10), 10, now)
        step(one, now, max_decode_steps=1)
        assert (one.load().num_waiting == 0) == is_admitted


def test_an_idle_engine_expects_the_worst_again() -> None:
    one, now = after_decoding(600)
    run(one, now)
    assert one.flush_cache()
    submit(one, "a", range(10), 700, 2000.0)
    step(one, 2000.0)
    submit(one, "b", range(100, 591), 10, 2001.0)  # 501 tokens, as at the very first
    step(one, 2001.0, max_decode_steps=1)
    assert one.load().num_waiting == 1


def test_a_prompt_that_was_chunked_reserves_room_for_its_output_in_its_last_batch() -> None:
    one = engine(order="fcfs", chunk_tokens=400)
    submit(one, "long", range(500), 400)
    submit(one, "b", range(1000, 1150), 10)  # needs 160, there are 1000 - 500 - 400
    step(one, 0.0)
    result = step(one, 1.0)
    assert result is not None
    assert result.first_tokens == ["long"]
    assert one.load().num_waiting == 1


@pytest.mark.parametrize(("num_steps", "reserved"), [(5000, 401.4), (9000, 97.9)])
def test_no_more_than_4096_tokens_of_output_to_come_are_reckoned_with(
    num_steps: int, reserved: float
) -> None:
    # of 10000 tokens 5001 or 9001 are generated: 4999 are to come, of which 4096 count, or 999; times 0.098
    room = 20_000 - 10 - num_steps - int(reserved) - 1
    for need_len, is_admitted in [(room, True), (room + 1, False)]:
        one = engine(kv_tokens=20_000, order="fcfs", max_prefill_tokens=20_000)
        submit(one, "a", range(10), 10_000)
        step(one, 0.0)
        step(one, 1.0, max_decode_steps=num_steps)
        submit(one, "b", range(100, 100 + need_len - 1), 1, 1.0 + num_steps)
        step(one, 1.0 + num_steps, max_decode_steps=1)
        assert (one.load().num_waiting == 0) == is_admitted


# Retraction


def test_who_has_least_output_is_retracted_and_goes_on_with_what_it_has() -> None:
    one, now = after_decoding(300)
    submit(one, "b", range(100, 110), 500, now)
    # 320 of 1000 tokens are held when b starts at 302: full after 340 steps, when b has 341 tokens
    run_until(one, 642.0, now)
    assert (num_output(one, "a"), num_output(one, "b")) == (641, 341)
    run_until(one, 643.0, 642.0)
    assert (num_output(one, "a"), num_output(one, "b")) == (642, 341)
    assert one.load().num_waiting == 1
    a, b = run(one, 643.0)
    assert (a.request_id, a.finished_at, a.num_retractions) == ("a", 701, 0)
    # its prompt of 10 is still cached: 341 tokens are computed at once, then 158 steps
    assert (b.first_token_at, b.finished_at, b.num_retractions) == (302, 701 + 1 + 158, 1)
    assert (b.usage.cached_tokens, b.usage.output_tokens) == (0, 500)
    assert one.load().prefilled_tokens == 10 + 10 + 341
    submit(one, "c", [*range(100, 110), *output_of("b", 500), 1], 1)
    assert cached_tokens(run(one)) == {"c": 509}


def test_of_two_with_equal_output_the_longer_prompt_is_retracted() -> None:
    one, now = after_decoding(300)
    submit(one, "b", range(100, 110), 250, now)
    submit(one, "c", range(200, 220), 230, now)
    finished = {str(one.request_id): one for one in run(one, now)}
    assert {name: one.num_retractions for name, one in finished.items()} == {"a": 0, "b": 0, "c": 1}
    assert {name: one.usage.output_tokens for name, one in finished.items()} == {"a": 700, "b": 250, "c": 230}
    # 660 tokens last for 220 steps of three; b needs 29 more, then c is computed again
    assert finished["b"].finished_at == 302 + 220 + 29
    assert finished["c"].finished_at == 551 + 1 + (230 - 222)


def test_what_waits_is_looked_at_again_one_step_after_a_retraction() -> None:
    one, now = after_decoding(300)
    submit(one, "b", range(100, 110), 500, now)
    run_until(one, 500.0, now)
    submit(one, "d", range(300, 490), 10, 500.0)  # 183 tokens of room: too little for 200
    finished = {str(one.request_id): one for one in run(one, 500.0)}
    assert finished["b"].num_retractions == 1
    assert finished["d"].first_token_at == 644


@pytest.mark.parametrize(("need_len", "first_token_at"), [(294, 644), (295, 702)])
def test_after_a_retraction_as_much_is_reserved_as_the_others_turned_out_to_need(
    need_len: int, first_token_at: float
) -> None:
    one, now = after_decoding(300)
    submit(one, "b", range(100, 110), 500, now)
    run_until(one, 640.0, now)
    submit(one, "d", range(1000, 1000 + need_len - 1), 1, 640.0)
    # at 643 there are 349 free; a has 58 of its 700 to come, (641 + 20) / 700 of which are expected: 294.3
    finished = {str(one.request_id): one for one in run(one, 640.0)}
    assert finished["d"].first_token_at == first_token_at


# Aborts


def test_what_waits_can_be_aborted() -> None:
    one = engine()
    submit(one, "a", range(10))
    submit(one, "b", range(100, 110))
    assert one.abort(RequestId("b"))
    assert not one.abort(RequestId("b"))
    assert [finished.request_id for finished in run(one)] == ["a"]


def test_an_aborted_prompt_keeps_the_chunks_it_has_computed() -> None:
    one = engine(chunk_tokens=10)
    submit(one, "a", range(35))
    step(one, 0.0)
    one.start(1.0)
    assert one.abort(RequestId("a"))
    assert one.is_running
    assert one.finish().first_tokens == []
    one.check_invariants()
    assert not one.has_work
    submit(one, "b", range(35))
    assert cached_tokens(run(one)) == {"b": 20}


def test_an_abort_during_the_prefill_reports_no_first_token() -> None:
    one = engine()
    submit(one, "a", range(10), 1)
    submit(one, "b", range(100, 110), 5)
    one.start(0.0)
    assert one.abort(RequestId("a"))
    assert one.abort(RequestId("b"))
    result = one.finish()
    assert (result.first_tokens, result.finished) == ([], [])
    one.check_invariants()
    assert not one.has_work
    assert one.cache.num_cached == 20


def test_an_aborted_answer_keeps_what_it_has_generated() -> None:
    one = engine()
    submit(one, "a", range(10), 100)
    run_until(one, 6.0)
    assert num_output(one, "a") == 6
    assert one.abort(RequestId("a"))
    one.check_invariants()
    assert not one.has_work
    submit(one, "b", [*range(10), *output_of("a", 6), 7])
    assert cached_tokens(run(one)) == {"b": 15}


def test_an_id_is_free_again_as_soon_as_it_is_aborted() -> None:
    one = engine()
    submit(one, "a", range(10), 5)
    step(one, 0.0)
    one.start(1.0)
    assert one.abort(RequestId("a"))
    submit(one, "a", range(20), 3, 1.0)
    one.finish()
    one.check_invariants()
    [finished] = run(one, 10.0)
    assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (20, 3)


# Pins


def test_a_pin_survives_pressure_that_evicts_its_unpinned_twin() -> None:
    one = engine(kv_tokens=100)
    submit(one, "a", range(20), 1)
    submit(one, "b", range(100, 120), 1)
    run(one)
    assert one.pins.pin("", pack(range(20)), until=50.0) == 20
    submit(one, "big", range(200, 270), 5, 10.0)
    run(one, 10.0)
    submit(one, "a", range(20), 1, 20.0)
    submit(one, "b", range(100, 120), 1, 20.0)
    assert cached_tokens(run(one, 20.0)) == {"a": 19, "b": 0}


def test_a_pin_expires() -> None:
    one = engine(kv_tokens=100)
    submit(one, "a", range(20), 1)
    run(one)
    one.pins.pin("", pack(range(20)), until=50.0)
    submit(one, "b", range(200, 280), 5, 49.9)
    submit(one, "c", range(300, 375), 5, 50.0)
    assert one.load().used_tokens == 20
    one.start(50.0)
    assert one.pins.num_pinned == 0
    one.finish()
    one.check_invariants()


def test_a_pin_holds_what_is_cached_of_it_and_no_more_than_the_share() -> None:
    one = engine(kv_tokens=100, max_pinned_share=0.3)
    submit(one, "a", range(20), 1)
    run(one)
    assert one.pins.pin("", pack(range(1000, 1010)), until=50.0) == 0
    assert one.pins.pin("other", pack(range(20)), until=50.0) == 0
    assert one.pins.pin("", pack(range(30)), until=50.0) == 20
    assert one.pins.pin("", pack(range(11)), until=50.0) == 0, "11 more are beyond 30"
    assert one.pins.pin("", pack(range(10)), until=60.0) == 10
    assert (one.pins.num_pinned, one.cache.num_locked) == (2, 20)
    one.pins.expire(50.0)
    assert (one.pins.num_pinned, one.cache.num_locked) == (1, 10)
    one.check_invariants()


def test_a_pin_starves_nobody() -> None:
    one = engine(kv_tokens=100)
    submit(one, "a", range(20), 1)
    run(one)
    one.pins.pin("", pack(range(20)), until=1e9)
    submit(one, "big", range(200, 290), 5, 10.0)
    [finished] = run(one, 10.0)
    assert finished.first_token_at == 11
    assert one.pins.num_pinned == 0


def test_a_pin_gives_way_to_a_request_that_has_begun() -> None:
    one = engine(kv_tokens=100, chunk_tokens=40)
    submit(one, "a", range(20), 1)
    run(one)
    submit(one, "big", range(200, 280), 15, 10.0)
    step(one, 10.0)
    one.pins.pin("", pack(range(20)), until=1e9)
    [finished] = run(one, 11.0)
    assert (finished.usage.output_tokens, finished.num_retractions) == (15, 0)
    assert one.pins.num_pinned == 0


def test_a_flush_drops_pins() -> None:
    one = engine()
    submit(one, "a", range(20), 1)
    run(one)
    one.pins.pin("", pack(range(20)), until=1e9)
    assert one.flush_cache()
    one.check_invariants()
    assert one.cache.num_free == one.cache.capacity


def test_many_that_press_on_a_small_cache_all_get_every_token() -> None:
    one = engine(kv_tokens=300, chunk_tokens=50, order="fcfs")
    for number in range(40):
        submit(one, f"r{number}", range(1000 * number, 1000 * number + 37), 60)
    results = list(steps(one))
    finished = [one for result in results for one in result.finished]
    assert len(finished) == 40
    assert sum(one.usage.output_tokens for one in finished) == 40 * 60
    assert sorted(name for result in results for name in result.first_tokens) == sorted(
        one.request_id for one in finished
    )
