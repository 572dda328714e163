"""The orders of the wait queue, on plain lengths and inside an engine."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_sgl.sim import wait_queue
from preble_sgl.sim.wait_queue import (
    AGING_LEN,
    MAX_MATCHED,
    Served,
    WaitOrder,
    by_groups,
    by_longest_match,
    by_predicted_length,
    group_of,
    level_of,
    ordered,
    wire_priority,
)
from tests.sim.engines import engine, step, submit


@dataclass(frozen=True)
class One:
    """A request that waits."""

    name: str
    matched_len: int
    total_len: int = 100
    beginning: object = None
    number: int = 0
    served_len: int = 0
    expected_len: float = 0
    waited_len: int = 0


def names(ordered: list[One]) -> str:
    return "".join(one.name for one in ordered)


some = st.lists(
    st.builds(
        One,
        name=st.sampled_from("abcdefgh"),
        matched_len=st.integers(0, 100),
        total_len=st.integers(100, 200),
        beginning=st.sampled_from([None, "x", "y"]),
    ),
    max_size=150,
)


# Longest prefix match


def test_lpm_takes_the_longest_match_first_and_equals_as_they_came() -> None:
    waiting = [One("a", 40), One("b", 60), One("c", 40), One("d", 99)]
    assert names(by_longest_match(waiting)) == "dbac"


def test_of_those_that_begin_alike_with_little_cached_only_the_first_keeps_its_place() -> None:
    waiting = [
        One("a", 0, beginning="x"),
        One("b", 32, beginning="x"),  # a twin of a, however it is matched up to 32
        One("c", 33, beginning="x"),  # enough is cached
        One("d", 0, beginning="y"),
        One("e", 0),  # too short to begin like another
        One("f", 0, beginning="y"),
    ]
    assert names(by_longest_match(waiting)) == "cadebf"


@settings(deadline=None, derandomize=True)
@given(some)
def test_lpm_loses_nobody_and_sorts_all_but_the_twins(waiting: list[One]) -> None:
    ordered = by_longest_match(waiting)
    assert Counter(ordered) == Counter(waiting)
    num_twins = 0
    seen: set[object] = set()
    for one in waiting:
        if one.matched_len <= 32 and one.beginning is not None:
            num_twins += one.beginning in seen
            seen.add(one.beginning)
    lengths = [one.matched_len for one in ordered[: len(ordered) - num_twins]]
    assert lengths == sorted(lengths, reverse=True)
    assert all(one.matched_len <= 32 for one in ordered[len(ordered) - num_twins :])


# Preble's groups


@pytest.mark.parametrize(
    ("matched_len", "total_len", "group"),
    [
        (63, 100, 6),
        (60, 100, 6),
        (59, 100, 5),
        (0, 100, 1),
        (19, 100, 1),
        (20, 100, 2),
        (99, 100, 9),
        (100, 100, 10),
        (1999, 2000, 9),
        (0, 1, 1),
    ],
)
def test_a_group_is_the_tenths_of_a_prompt_that_are_cached(
    matched_len: int, total_len: int, group: int
) -> None:
    assert group_of(One("a", matched_len, total_len)) == group


def test_a_turn_takes_as_many_of_each_group_as_its_number_says() -> None:
    waiting = [One(str(group), 10 * group) for group in range(1, 11) for _ in range(20)]
    groups = [group_of(one) for one in by_groups(waiting)]
    turn = [group for group in range(10, 0, -1) for _ in range(group)]
    assert groups[:110] == turn + turn
    # of group 10 all 20 are gone, of group 9 two are left, and so on
    assert groups[110:114] == [9, 9, 8, 8]


def test_within_a_group_they_go_as_they_came() -> None:
    waiting = [One(name, 65) for name in "abcdefghij"]
    assert names(by_groups(waiting)) == "abcdefghij"


@settings(deadline=None, derandomize=True)
@given(some)
def test_groups_lose_nobody_and_keep_each_group_in_its_order(waiting: list[One]) -> None:
    ordered = by_groups(waiting)
    assert Counter(ordered) == Counter(waiting)
    for group in range(1, 11):
        assert [one for one in ordered if group_of(one) == group] == [
            one for one in waiting if group_of(one) == group
        ]


@settings(deadline=None, derandomize=True)
@given(some)
def test_nobody_waits_for_more_than_the_turns_before_its_own(waiting: list[One]) -> None:
    ordered = by_groups(waiting)
    for number in range(1, 11):
        places = [place for place, one in enumerate(ordered) if group_of(one) == number]
        for index, place in enumerate(places):
            assert place < 55 * (index // number + 1)


# In an engine, one at a time


def order_of(order: str, num_strangers: int = 0) -> list[str]:
    """Cache 50 tokens, then let three wait that match 0, 20 and 50 of them; return who runs, in order."""
    one = engine(order=order, max_running=1, kv_tokens=10_000)
    submit(one, "before", range(50), 1)
    step(one, 0.0)
    submit(one, "none", range(1000, 1060), 1)
    submit(one, "some", [*range(20), *range(2000, 2040)], 1)
    submit(one, "most", [*range(50), *range(3000, 3010)], 1)
    for number in range(num_strangers):
        submit(one, f"x{number:03d}", [10_000 + number], 1)
    ran, now = list[str](), 1.0
    while result := step(one, now):
        now = result.ended_at
        ran += [str(finished.request_id) for finished in result.finished]
    return ran


def test_fcfs_is_as_they_came() -> None:
    assert order_of("fcfs") == ["none", "some", "most"]


def test_lpm_and_groups_begin_with_what_is_cached() -> None:
    assert order_of("lpm") == ["most", "some", "none"]
    assert order_of("preble_groups") == ["most", "some", "none"]


def test_lpm_takes_them_as_they_stand_while_more_wait_than_are_matched() -> None:
    assert order_of("lpm", MAX_MATCHED - 3)[:3] == ["most", "some", "none"]
    ran = order_of("lpm", MAX_MATCHED - 3 + 1)
    # the first is taken as it stands, then 128 are left
    assert ran[:3] == ["none", "most", "some"]
    assert len(ran) == MAX_MATCHED + 1


# Least service, levels, predicted length


def test_las_begins_with_the_program_that_was_served_least() -> None:
    waiting = [One("a", 0, served_len=900), One("b", 0, served_len=10), One("c", 0, served_len=900)]
    assert names(ordered("las", numbered(waiting))) == "bac"


@pytest.mark.parametrize(
    ("served_len", "missing_len", "level"),
    [
        (0, 1, 0),
        (0, 512, 0),
        (0, 513, 1),
        (512, 1, 1),
        (0, 1024, 1),
        (1000, 25, 2),
        (0, 4096, 3),
        (4000, 97, 4),
    ],
)
def test_a_level_is_twice_as_wide_as_the_one_before(served_len: int, missing_len: int, level: int) -> None:
    assert level_of(One("a", 50, 50 + missing_len, served_len=served_len)) == level


def test_mlfq_takes_levels_in_turn_and_each_as_they_came() -> None:
    waiting = [One("a", 0, 2000), One("b", 0, 100), One("c", 0, 1900), One("d", 90, 100, served_len=600)]
    assert names(ordered("mlfq", numbered(waiting))) == "bdac"


def test_spf_begins_with_the_least_missing_prompt_and_expected_output() -> None:
    waiting = [One("a", 0, 100, expected_len=10), One("b", 0, 170), One("c", 90, 100, expected_len=25)]
    assert names(ordered("spf", numbered(waiting))) == "bac"


def test_spf_goes_by_another_predictor_if_given() -> None:
    waiting = [One("a", 0, expected_len=1), One("b", 0, expected_len=50)]
    assert names(by_predicted_length(waiting, lambda one: 100 - one.expected_len)) == "ba"


@pytest.mark.parametrize("order", ["las", "mlfq", "spf"])
def test_who_was_overtaken_for_long_goes_first_as_they_came(order: WaitOrder) -> None:
    light = {"total_len": 10}
    heavy = {"total_len": 9000, "served_len": 9000, "expected_len": 9000.0}
    waiting = [
        One("a", 0, waited_len=AGING_LEN - 1, **heavy),  # type: ignore[arg-type]
        One("b", 0, waited_len=AGING_LEN, **heavy),  # type: ignore[arg-type]
        One("c", 0, **light),
        One("d", 0, waited_len=2 * AGING_LEN, **light),
    ]
    assert names(ordered(order, numbered(waiting))) == "bdca"


orders = st.sampled_from(get_args(WaitOrder))
weighed = st.lists(
    st.builds(
        One,
        name=st.sampled_from("abcdefgh"),
        matched_len=st.integers(0, 100),
        total_len=st.integers(100, 5000),
        beginning=st.sampled_from([None, "x"]),
        served_len=st.integers(0, 5000),
        expected_len=st.integers(0, 500),
        waited_len=st.sampled_from([0, 10, AGING_LEN, AGING_LEN + 1]),
    ),
    max_size=150,
)


@settings(deadline=None, derandomize=True)
@given(orders, weighed)
def test_every_order_keeps_everybody_and_is_the_same_each_time(order: WaitOrder, waiting: list[One]) -> None:
    came = numbered(waiting)
    first = ordered(order, came)
    assert Counter(first) == Counter(came)
    if order not in ("fcfs", "lpm"):  # those two go by how the queue stands
        assert ordered(order, list(reversed(came))) == first


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(["las", "mlfq", "spf"]), weighed)
def test_priorities_on_the_wire_agree_with_the_order_where_nothing_ages(
    order: WaitOrder, waiting: list[One]
) -> None:
    young = [replace(one, waited_len=0) for one in numbered(waiting)]
    priorities = [
        wire_priority(
            order,
            matched_len=one.matched_len,
            total_len=one.total_len,
            served_len=one.served_len,
            expected_len=one.expected_len,
        )
        for one in ordered(order, young)
    ]
    assert priorities == sorted(priorities, reverse=True)


def test_service_is_remembered_of_those_who_were_served_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_queue, "MAX_PROGRAMS", 2)
    served = Served()
    for program, num_tokens in (("a", 5), ("b", 7), ("a", 1), ("c", 2)):
        served.add(program, num_tokens)
    assert [served[program] for program in "abc"] == [6, 0, 2]


def numbered(waiting: list[One]) -> list[One]:
    return [replace(one, number=number) for number, one in enumerate(waiting)]
