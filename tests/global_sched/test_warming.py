"""Warm-ups: what is worth computing ahead of use, and for whom."""

import random

import pytest

from preble_sgl.core import PlanHint, ProgramId, Request, WarmUp, WorkerId, new_request_id, token_ids
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.global_sched.scheduler import GlobalScheduler
from tests.global_sched.stories import CPU_TINY

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
HOT = list(range(100))


def request(prompt: list[int], program_id: str = "p") -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId(program_id),
        call_path="p/call0",
        prompt=token_ids(prompt),
    )


def fleet(*workers: WorkerId, kv_tokens: int = 1000) -> GlobalScheduler:
    one = make_scheduler("round_robin", rng=random.Random(0))
    for worker_id in workers:
        one.on_worker_up(worker_id, kv_tokens=kv_tokens, profile=CPU_TINY, now=0.0)
    return one


def serve(one: GlobalScheduler, *prompts: list[int], now: float = 1.0) -> None:
    """Run requests to their ends, one after the other."""
    for prompt in prompts:
        asked = request(prompt)
        one.submit(asked, now)
        (placement,) = one.dispatch(now)
        one.on_first_token(placement.request_id, now)
        one.on_finish(placement.request_id, output=token_ids([7]), cached_tokens=0, now=now)
    one.check_invariants()


def proposed(one: GlobalScheduler) -> dict[WorkerId, list[int]]:
    return {warm_up.worker_id: warm_up.prefix.tolist() for warm_up in one.warming.propose()}


def questions(number: int) -> list[list[int]]:
    """Return prompts that share HOT."""
    return [[*HOT, 1000 + index, *range(10)] for index in range(number)]


def test_a_worker_that_comes_up_is_offered_what_calls_lately_had_in_common() -> None:
    one = fleet(A)
    serve(one, *questions(6))
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=2.0)
    (warm_up,) = one.warming.propose()
    assert (warm_up.worker_id, warm_up.prefix.tolist(), warm_up.namespace) == (B, HOT, "")
    # Six calls lately, of which three may come to each of two workers; one computes it anyhow.
    assert warm_up.value_s == pytest.approx(2 * CPU_TINY.prefill_s(100))


def test_one_at_a_time_until_it_is_done_and_then_it_is_known() -> None:
    one = fleet(A)
    serve(one, *questions(6))
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=2.0)
    (warm_up,) = one.warming.propose()
    assert one.warming.propose() == []
    one.warming.done(warm_up, computed=False)
    (again,) = one.warming.propose()
    one.warming.done(again, computed=True)
    assert one.warming.propose() == []
    asked = request([*HOT, 5])
    one.submit(asked, 3.0)
    one.check_invariants()
    assert {p.worker_id: p.matched_len for p in one.dispatch(3.0)} in ({A: 100}, {B: 100})


def test_what_is_not_used_again_is_not_worth_it() -> None:
    one = fleet(A)
    serve(one, [*range(200, 300)], [*range(300, 400)])  # once each
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=2.0)
    assert one.warming.propose() == []


def test_a_worker_with_something_to_do_is_left_alone() -> None:
    one = fleet(A)
    serve(one, *questions(6))
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=2.0)
    one.on_worker_drain(A, 2.0)
    one.submit(request([9, 9, 9]), 2.0)
    assert [placement.worker_id for placement in one.dispatch(2.0)] == [B]
    assert one.warming.propose() == []


def test_nothing_is_evicted_for_a_warm_up() -> None:
    one = fleet(A)
    serve(one, *questions(6))
    one.on_worker_up(B, kv_tokens=99, profile=CPU_TINY, now=2.0)
    assert one.warming.propose() == []


def test_a_worker_that_goes_takes_its_warm_up_with_it() -> None:
    one = fleet(A)
    serve(one, *questions(6))
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=2.0)
    (warm_up,) = one.warming.propose()
    one.on_worker_down(B, 2.0)
    one.warming.done(warm_up, computed=True)
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=3.0)
    assert proposed(one) == {B: HOT}
    one.check_invariants()


def test_what_only_a_leaving_worker_has_goes_where_there_is_room_the_best_first() -> None:
    one = fleet(A, B, C)
    little, much = list(range(500, 540)), list(range(600, 800))
    serve(one, [*much, 1], [*little, 1], [9] * 300)  # one each, by turns
    serve(one, [*much, 2])
    one.on_worker_drain(A, 2.0)
    (first, *others) = one.warming.rescue(A)
    assert first.prefix.tolist() == [*much]
    assert first.worker_id == B  # which has 41 tokens, C has 300
    # The ends of the two calls: on the same worker, behind what they have in common.
    assert {tuple(one.prefix[200:]) for one in others} <= {(1,), (2,)}
    assert {one.worker_id for one in others} <= {B}


def test_what_others_have_too_needs_no_rescue() -> None:
    one = fleet(A, B)
    serve(one, HOT, HOT)
    one.on_worker_drain(A, 2.0)
    assert one.warming.rescue(A) == []


def test_there_is_no_rescue_without_room() -> None:
    one = fleet(A)
    serve(one, *questions(3))
    one.on_worker_up(B, kv_tokens=50, profile=CPU_TINY, now=2.0)
    one.on_worker_drain(A, 2.0)
    assert one.warming.rescue(A) == []


def test_what_open_programs_plan_to_use_counts_as_calls_to_come() -> None:
    one = fleet(A)
    for number in range(4):
        program_id = ProgramId(f"p{number}")
        one.register_plan(PlanHint(program_id=program_id, prefixes=(token_ids(HOT),)), 1.0)
        asked = request([*HOT, number], program_id=program_id)
        one.submit(asked, 1.0)
        (placement,) = one.dispatch(1.0)
        one.on_first_token(placement.request_id, 1.0)
        one.on_finish(placement.request_id, output=token_ids([7]), cached_tokens=0, now=1.0)
    one.on_worker_up(B, kv_tokens=1000, profile=CPU_TINY, now=500.0)  # nothing is recent any more
    (warm_up,) = one.warming.propose()
    assert warm_up.prefix.tolist() == HOT
    assert warm_up.value_s == pytest.approx((4 / 2 - 1) * CPU_TINY.prefill_s(100))


@pytest.mark.parametrize("seed", range(5))
def test_random_lives_with_warm_ups_keep_the_scheduler_in_order(seed: int) -> None:
    rng = random.Random(seed)
    one = fleet(A, B, C, kv_tokens=400)
    under_way: list[WarmUp] = []
    up = {A, B, C}
    for now in range(200):
        action = rng.random()
        if action < 0.5 and up:
            begin = rng.choice([HOT, list(range(300, 380))])
            serve(
                one,
                [*begin[: rng.randrange(1, len(begin))], *range(2000, 2000 + rng.randrange(1, 40))],
                now=now,
            )
        elif action < 0.75:
            under_way += one.warming.propose()
        elif action < 0.9 and under_way:
            one.warming.done(under_way.pop(rng.randrange(len(under_way))), computed=rng.random() < 0.7)
        elif len(up) > 1:
            gone = rng.choice(sorted(up))
            one.on_worker_drain(gone, float(now))
            assert all(warm_up.worker_id in up - {gone} for warm_up in one.warming.rescue(gone))
            one.on_worker_down(gone, float(now))
            up.remove(gone)
        else:
            for worker_id in {A, B, C} - up:
                one.on_worker_up(worker_id, kv_tokens=400, profile=CPU_TINY, now=float(now))
            up = {A, B, C}
        one.check_invariants()
