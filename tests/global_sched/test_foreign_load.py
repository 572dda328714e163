"""What others have a runtime do counts as its load; the lag of reports about our own requests does not."""

import random

import pytest

from preble_sgl.core import (
    ProgramId,
    Request,
    SamplingParams,
    WorkerId,
    WorkerLoad,
    new_request_id,
    token_ids,
)
from preble_sgl.errors import UnknownIdError
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.global_sched.scheduler import GlobalScheduler
from tests.global_sched.stories import CPU_TINY

A, B = WorkerId("a"), WorkerId("b")


def fleet(policy: str = "least_load") -> GlobalScheduler:
    one = make_scheduler(policy, rng=random.Random(0))
    for worker_id in (A, B):
        one.on_worker_up(worker_id, kv_tokens=10_000, profile=CPU_TINY, now=0.0)
    return one


def report(one: GlobalScheduler, worker_id: WorkerId, *nums: int) -> int:
    """Report so many requests each time; return how many are taken for others'."""
    for num in nums:
        one.on_load(worker_id, WorkerLoad(num_requests=num), 0.0)
    return next(w.num_foreign for w in one.snapshot().workers if w.worker_id == worker_id)


def place(one: GlobalScheduler, *tokens: int) -> WorkerId:
    asked = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p",
        prompt=token_ids(tokens),
        sampling=SamplingParams(max_new_tokens=4),
    )
    one.submit(asked, 0.0)
    (placement,) = one.dispatch(0.0)
    return placement.worker_id


@pytest.mark.parametrize("policy", ["least_load", "preble_e2", "preble_plan"])
def test_a_worker_that_others_load_is_avoided(policy: str) -> None:
    one = fleet(policy)
    assert report(one, A, 6, 5, 6, 6) == 5
    assert [place(one, number, number) for number in range(3)] == [B, B, B]
    one.check_invariants()


def test_our_own_requests_are_not_taken_for_others() -> None:
    one = fleet()
    assert place(one, 1, 1) == A
    assert report(one, A, 1, 1, 1, 1) == 0


def test_one_late_report_is_not_believed() -> None:
    one = fleet()
    assert report(one, A, 3, 3, 3) == 0  # not often enough
    assert report(one, A, 0) == 0
    assert report(one, A, 3, 3, 3) == 0
    assert report(one, A, 3) == 3
    assert report(one, A, 0) == 0  # and gone at once


def test_a_worker_that_comes_back_begins_with_nothing() -> None:
    one = fleet()
    assert report(one, A, 4, 4, 4, 4) == 4
    one.on_worker_down(A, 0.0)
    one.on_worker_up(A, kv_tokens=10_000, profile=CPU_TINY, now=0.0)
    assert report(one, A) == 0
    with pytest.raises(UnknownIdError):
        one.on_load(WorkerId("c"), WorkerLoad(num_requests=1), 0.0)
