"""A worker that fails at everything is left alone."""

from preble_sgl.breaker import LONGEST_PAUSE_S, Breaker
from preble_sgl.core import RequestId, WorkerId

A, B = WorkerId("a"), WorkerId("b")


def fail(breaker: Breaker, worker_id: WorkerId, *numbers: int) -> list[float | None]:
    return [breaker.failed(worker_id, RequestId(str(number))) for number in numbers]


def test_three_requests_in_a_row_are_enough() -> None:
    assert fail(Breaker(), A, 1, 2, 3) == [None, None, 2.0]


def test_one_request_that_fails_everywhere_is_no_worker_s_fault() -> None:
    breaker = Breaker()
    assert fail(breaker, A, 1, 1, 1, 1) == [None] * 4
    assert fail(breaker, B, 1, 1, 1, 1) == [None] * 4


def test_a_success_forgives() -> None:
    breaker = Breaker()
    fail(breaker, A, 1, 2)
    breaker.succeeded(A)
    assert fail(breaker, A, 3, 4) == [None, None]


def test_one_that_comes_back_and_fails_is_left_alone_for_longer() -> None:
    breaker = Breaker()
    assert fail(breaker, A, 1, 2, 3, 4, 5) == [None, None, 2.0, 4.0, 8.0]
    assert fail(breaker, A, *range(6, 16))[-1] == LONGEST_PAUSE_S
    breaker.succeeded(A)
    assert fail(breaker, A, 20, 21, 22) == [None, None, 2.0]
