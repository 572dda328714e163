"""The aggregate of a run, on records with round numbers."""

import dataclasses
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_sgl.core import Placement, ProgramId, RequestId, RequestRecord, Usage, WorkerId
from preble_sgl.sim.report import Summary, percentile, program_latencies, summarise, tpot_s

W0, W1 = WorkerId("w0"), WorkerId("w1")
ONE_TOKEN = Usage(100, 0, 1)


def record(
    submitted_at: float,
    first_token_at: float,
    finished_at: float,
    *,
    program: str = "p",
    usage: Usage = ONE_TOKEN,
) -> RequestRecord:
    return RequestRecord(
        request_id=RequestId("r"),
        program_id=ProgramId(program),
        call_path="c",
        placement=Placement(RequestId("r"), W0, 0, "only_worker"),
        usage=usage,
        finish_reason="length",
        submitted_at=submitted_at,
        placed_at=submitted_at,
        first_token_at=first_token_at,
        finished_at=finished_at,
    )


@pytest.mark.parametrize(
    ("num", "share", "value"),
    [
        (1, 0.5, 1),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (4, 0.5, 2),
        (10, 0.99, 10),
        (100, 0.99, 99),
        (101, 0.99, 100),
        (100, 0.0, 1),
        (100, 1.0, 100),
    ],
)
def test_a_percentile_is_one_of_the_values(num: int, share: float, value: int) -> None:
    assert percentile(list(range(1, num + 1)), share) == value


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[int], share: float) -> None:
    value = percentile(sorted(values), share)
    enough = ceil(share * len(values))
    assert value in values
    assert sum(other <= value for other in values) >= enough
    assert sum(other < value for other in values) < enough


@pytest.mark.parametrize("hundreds", [1, 2, 3, 7, 10, 29, 57, 100, 1000])
def test_the_last_percent_of_whole_hundreds_is_whole(hundreds: int) -> None:
    assert percentile(range(1, 100 * hundreds + 1), 0.99) == 99 * hundreds


def test_a_summary_adds_up() -> None:
    records = [
        record(10, 11, 14, program="a", usage=Usage(100, 50, 4)),
        record(12, 16, 16, program="b", usage=Usage(200, 0, 1)),
        record(14, 18, 24, program="a", usage=Usage(100, 90, 3)),
    ]
    assert summarise(records, 2, {W0: 6.0, W1: 2.0}) == Summary(
        finished=3,
        failed=2,
        mean_e2e_s=(4 + 4 + 10) / 3,
        p50_e2e_s=4,
        p99_e2e_s=10,
        mean_ttft_s=(1 + 4 + 4) / 3,
        p99_ttft_s=4,
        mean_tpot_s=(3 / 3 + 6 / 2) / 2,
        mean_program_s=(14 + 4) / 2,
        p99_program_s=14,
        makespan_s=14,
        hit_rate=140 / 400,
        imbalance=1.5,
    )


def test_a_program_lasts_from_its_first_submission_to_its_last_end() -> None:
    records = [
        record(5, 6, 20, program="a"),
        record(3, 4, 10, program="a"),
        record(1, 2, 4, program="b"),
    ]
    assert program_latencies(records) == [17, 3]


def test_time_per_output_token_is_that_after_the_first() -> None:
    assert tpot_s(record(0, 4, 10, usage=Usage(10, 0, 4))) == 2


def test_an_answer_of_one_token_has_no_time_per_output_token() -> None:
    assert summarise([record(0, 4, 4)], 0, {W0: 1.0}).mean_tpot_s == 0.0


def test_the_hit_rate_is_by_tokens_and_not_by_requests() -> None:
    records = [record(0, 1, 1, usage=Usage(10, 10, 1)), record(0, 1, 1, usage=Usage(990, 0, 1))]
    assert summarise(records, 0, {W0: 1.0}).hit_rate == 0.01


@pytest.mark.parametrize(
    ("busy_s", "imbalance"),
    [
        ({W0: 3.0, W1: 3.0}, 1.0),
        ({W0: 4.0, W1: 0.0}, 2.0),
        ({W0: 5.0}, 1.0),
        ({W0: 0.0, W1: 0.0}, 1.0),
        ({}, 1.0),
    ],
)
def test_imbalance_is_the_busiest_over_the_mean(busy_s: dict[WorkerId, float], imbalance: float) -> None:
    assert summarise([], 0, busy_s).imbalance == imbalance


def test_a_run_in_which_nothing_finished_has_zeros() -> None:
    summary = summarise([], 3, {W0: 0.0})
    assert (summary.finished, summary.failed, summary.imbalance) == (0, 3, 1.0)
    rest = dataclasses.asdict(summary).items() - {("failed", 3), ("imbalance", 1.0)}
    assert {value for _, value in rest} == {0}
