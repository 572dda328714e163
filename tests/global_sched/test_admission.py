"""Which programs are let in, where and when: limits, room in the KV cache, plans and pauses."""

import random

import pytest

from preble_sgl.core import ProgramId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched import make_scheduler
from tests.global_sched.plan_story import PlanStory

# @K


def test_behind_a_limit_the_next_program_waits_until_one_has_ended() -> None:
    story = PlanStory(open_limit=2)
    assert story.ask("a", "a:10") == ["a"]
    assert story.ask("b", "b:10") == ["b"]
    assert story.ask("c", "c:10") == []
    assert story.scheduler.snapshot().num_waiting == 1
    assert story.finish("a") == ["c"]


def test_calls_of_an_open_program_do_not_count_against_the_limit() -> None:
    story = PlanStory(open_limit=1)
    assert story.ask("a1", "a:10", program="a") == ["a1"]
    assert story.ask("b1", "b:10", program="b") == []
    assert story.ask("a2", "a:10 x:10", program="a") == ["a2"]
    assert story.ask("b2", "b:10 x:10", program="b") == []
    story.finish("a1")
    assert story.finish("a2") == ["b1", "b2"]


def test_a_planned_program_stays_open_between_its_calls() -> None:
    story = PlanStory(open_limit=1)
    story.plan("a")
    story.ask("a1", "a:10", program="a")
    assert story.ask("b", "b:10") == []
    assert story.finish("a1") == []
    assert story.ask("a2", "a:10", program="a") == ["a2"]
    assert story.finish("a2") == []
    assert story.release("a") == ["b"]


def test_giving_up_the_first_in_line_lets_the_next_of_its_program_take_its_place() -> None:
    story = PlanStory(open_limit=1)
    story.ask("a", "a:10")
    story.ask("b1", "b:10", program="b")
    story.ask("b2", "b:10 x:10", program="b")
    story.ask("c", "c:10")
    story.cancel("b1")
    assert story.finish("a") == ["b2"]


@pytest.mark.parametrize("name", ["sticky@0", "sticky@x", "sticky@", "nobody@3", "nobody"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        make_scheduler(name, rng=random.Random(0))


def test_an_objective_is_only_for_the_policy_that_has_one() -> None:
    with pytest.raises(InputError, match="objective 'latency' is for preble_plan"):
        make_scheduler("sticky", rng=random.Random(0), objective="latency")


# KV room


def test_a_program_is_opened_only_where_its_plan_fits() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    for program, kv_tokens in (("a", 1190), ("b", 790), ("c", 12)):
        story.plan(program, kv_tokens)
    assert story.ask("a1", "a:10", program="a") == ["a1"]  # (10 + 1,190) / 2 = 600
    assert story.ask("b1", "b:10", program="b") == ["b1"]  # (10 + 790) / 2 = 400, which makes 1,000
    assert story.ask("c1", "c:10", program="c") == []
    story.finish("b1")
    assert story.release("b") == ["c1"]


def test_a_program_of_one_call_needs_no_room_kept() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    story.plan("a", 1990)
    story.plan("one", 40)
    story.plan("two", 41)
    assert story.ask("a1", "a:10", program="a") == ["a1"]
    assert story.ask("one1", "one:10", program="one", max_tokens=30) == ["one1"]
    assert story.ask("two1", "two:10", program="two", max_tokens=30) == []


def test_what_a_worker_has_of_a_program_needs_no_new_room() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    for program in ("a", "b", "c"):
        story.plan(program, 702)
    assert story.ask("a1", "document:600 a:100", program="a") == ["a1"]  # 701
    story.first_token("a1")
    assert story.ask("b1", "document:600 b:100", program="b") == ["b1"]  # 101 more
    assert story.ask("c1", "other:600 c:100", program="c") == []
    assert story.finish("b1") == []
    assert story.release("b") == []
    story.finish("a1")
    assert story.release("a") == ["c1"]


def test_in_short_first_order_what_shares_with_what_runs_passes_what_needs_much_room() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True, depth_first=True, short_first=True)
    for program in ("a", "big", "b"):
        story.plan(program, 702)
    assert story.ask("a1", "document:600 a:100", program="a") == ["a1"]
    story.first_token("a1")
    assert story.ask("big1", "other:600 c:100", program="big") == []
    assert story.ask("b1", "document:600 b:100", program="b") == []
    assert story.dispatch() == ["b1"]
    story.finish("a1")
    assert story.release("a") == ["big1"]  # 701 beside the 101 that b was promised


def test_an_empty_worker_takes_even_a_program_that_does_not_fit() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    story.plan("a", 5000)
    assert story.ask("a1", "a:10", program="a") == ["a1"]


def test_without_a_plan_unfinished_requests_need_what_they_add() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    assert story.ask("a", "shared:500 a:100") == ["a"]
    story.first_token("a")
    assert story.ask("b", "shared:500 b:300") == ["b"]  # 600 + 300
    assert story.ask("c", "shared:500 c:101") == []  # 900 + 101
    assert story.ask("d", "shared:500 d:1") == []  # would fit, but nobody is overtaken
    assert story.finish("b") == ["c", "d"]


def test_expected_output_needs_room_too() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    assert story.ask("a", "a:900", max_tokens=30) == ["a"]
    assert story.ask("b", "b:41", max_tokens=30) == []  # 900 + 30 + 41 + 30 = 1,001
    story.cancel("b")
    assert story.ask("c", "c:40", max_tokens=30) == ["c"]


def test_programs_go_where_there_is_room() -> None:
    story = PlanStory(kv_tokens=1000, kv_room=True)
    for i in range(2):
        story.plan(f"p{i}", 1990)
        story.ask(f"r{i}", f"r{i}:10", program=f"p{i}")
    assert [story.worker_of("r0"), story.worker_of("r1")] == ["w0", "w1"]
    story.plan("p2", 12)
    assert story.ask("r2", "r2:10", program="p2") == []


def test_the_objective_latency_opens_few_programs_per_worker() -> None:
    story = PlanStory(workers=["w0"], objective="latency")
    sent = [story.ask(f"r{i}", f"r{i}:10") for i in range(18)]
    assert sent == [*([f"r{i}"] for i in range(16)), [], []]


# Plans


def test_a_program_is_opened_where_its_later_calls_find_their_prefix() -> None:
    story = PlanStory("preble_plan")
    story.ask("seed0", "other:50")
    story.ask("seed1", "doc:1000")
    where = story.worker_of("seed1")
    for done in ("seed0", "seed1"):
        story.finish(done)
    story.plan("p", 0, "doc:1000")
    story.ask("first", "other:50 hello:5", program="p")
    assert story.worker_of("first") == where != story.worker_of("seed0")


def test_a_pause_keeps_its_room_up_to_ten_times_what_computing_again_would_take() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True, hold_pauses=True)
    story.plan("a", 1190)
    story.ask("a1", "a:10", program="a")  # is promised 600 tokens
    story.finish("a1")
    story.ask("b", "b:500")
    assert story.pause("a", expected_s=5999.0) == []
    assert story.pause("a", expected_s=6001.0) == ["b"]
    assert story.ask("a2", "a:10", program="a") == []
    assert story.finish("b") == ["a2"]


def test_what_a_finished_branch_held_is_given_to_others() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    story.plan("a", 1190)
    story.ask("a1", "a:10", program="a")  # is promised 600 tokens
    story.ask("b", "b:500")
    story.scheduler.on_branch_done(ProgramId("a"), 99, story.now)
    assert story.dispatch() == []
    story.scheduler.on_branch_done(ProgramId("a"), 1, story.now)
    assert story.dispatch() == ["b"]


def test_what_an_open_program_will_use_again_is_dear_to_evict() -> None:
    story = PlanStory("preble_plan", kv_tokens=1000)
    story.plan("p", None, "doc:600")
    story.ask("p1", "doc:600 x:10", program="p")
    story.ask("other", "other:610")
    for done in ("p1", "other"):
        story.finish(done)
    assert story.worker_of("p1") == "w0"
    story.now = 200.0  # nobody asked for either within the window, but p is going to
    story.ask("new", "new:500", max_tokens=100)
    assert story.worker_of("new") == "w1"
    assert story.placed["new"].costs == {"w0": 500 + 610, "w1": 500}
    assert story.release("p") == []
    story.scheduler.check_invariants()


def test_a_program_with_calls_under_way_does_not_pause() -> None:
    story = PlanStory(workers=["w0"], kv_tokens=1000, kv_room=True)
    story.plan("a", 600)
    story.ask("a1", "a:10", program="a")
    story.ask("b", "b:500")
    assert story.pause("a", expected_s=1e9) == []


def test_plans_of_unknown_or_ended_programs_are_refused() -> None:
    story = PlanStory()
    story.plan("a")
    with pytest.raises(InputError, match="under way"):
        story.plan("a")
    story.ask("a1", "a:10", program="a")
    story.release("a")
    with pytest.raises(InputError, match="was released"):
        story.ask("a2", "a:10", program="a")
    story.finish("a1")
    for call in (story.release, lambda program: story.pause(program, 1.0)):
        with pytest.raises(UnknownIdError):
            call("a")
    assert story.scheduler.snapshot().num_open_programs == 0


def test_without_pressure_everything_is_sent_at_once_and_documents_stay_whole() -> None:
    story = PlanStory("preble_plan", late_binding=True, kv_room=True, depth_first=True, stealing=True)
    for i in range(8):
        story.ask(f"r{i}", f"doc{i % 4}:100 r{i}:10")
    for i in range(4):
        story.first_token(f"r{i}")
    assert story.scheduler.num_queued == story.scheduler.num_held == 0
    assert [story.worker_of(f"r{i}") for i in range(8)] == ["w0", "w1", "w0", "w1"] * 2
