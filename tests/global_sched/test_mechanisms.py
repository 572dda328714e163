"""What the scheduler does besides asking its policy: each mechanism in stories with exact numbers."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from preble_sgl.core import PlanHint, ProgramId, SamplingParams, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched import CostProfile, GlobalScheduler, Mechanisms, make_policy, make_scheduler
from tests.global_sched.stories import FREE_DECODE, ONE_SECOND_PER_TOKEN, Story, prompt, request


class PlanStory(Story):
    """A story whose requests name their program, tenant and priority."""

    def __init__(
        self,
        policy: str = "round_robin",
        workers: Sequence[str] = ("w0", "w1"),
        *,
        kv_tokens: int = 1_000_000,
        profile: CostProfile = FREE_DECODE,
        **mechanisms: Any,
    ) -> None:
        super().__init__("round_robin", (), kv_tokens=kv_tokens, profile=profile)
        self.scheduler = GlobalScheduler(
            make_policy(policy), rng=random.Random(0), mechanisms=Mechanisms(**mechanisms)
        )
        for worker in workers:
            self.up(worker)

    def ask(
        self,
        request_id: str,
        text: str,
        *,
        program: str | None = None,
        tenant: str = "default",
        priority: int = 0,
        max_tokens: int = 0,
    ) -> list[str]:
        """Submit a request and return what was sent then."""
        self.requests[request_id] = replace(
            request(request_id, text),
            program_id=ProgramId(program or request_id),
            tenant=tenant,
            priority=priority,
            sampling=SamplingParams(max_new_tokens=max_tokens),
        )
        self.scheduler.submit(self.requests[request_id], self.now)
        self.scheduler.check_invariants()
        return self.dispatch()

    def plan(
        self, program: str, kv_tokens: int | None = 0, *prefixes: str, deadline_at: float | None = None
    ) -> None:
        hint = PlanHint(
            program_id=ProgramId(program),
            kv_tokens=kv_tokens,
            prefixes=tuple(map(prompt, prefixes)),
            deadline_at=deadline_at,
        )
        self.scheduler.register_plan(hint, self.now)

    def release(self, program: str) -> list[str]:
        self.scheduler.release_program(ProgramId(program), self.now)
        return self.dispatch()

    def pause(self, program: str, expected_s: float) -> list[str]:
        self.scheduler.on_pause(ProgramId(program), expected_s, self.now)
        return self.dispatch()


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


# Late binding


def test_a_request_is_bound_when_its_worker_can_start_it_soon() -> None:
    story = PlanStory(workers=["w0"], late_binding=True)
    assert story.ask("a", "a:8192") == ["a"]
    assert story.ask("b", "b:10") == []
    assert story.scheduler.num_queued == 1
    assert story.first_token("a") == ["b"]


def test_what_is_not_bound_yet_moves_when_its_worker_dies() -> None:
    story = PlanStory("least_load", late_binding=True)
    for name in ("a", "b", "c"):
        story.ask(name, f"{name}:9000")
    assert (story.worker_of("a"), story.worker_of("b")) == ("w0", "w1")
    assert story.scheduler.num_queued == 1
    story.scheduler.on_worker_down(WorkerId("w0"), story.now)
    assert story.first_token("b") == ["a"]
    assert story.first_token("a") == ["c"]
    assert {story.worker_of("a"), story.worker_of("c")} == {"w1"}


def test_what_is_not_bound_yet_can_be_given_up() -> None:
    story = PlanStory(workers=["w0"], late_binding=True)
    story.ask("a", "a:9000")
    story.ask("b", "b:10")
    story.cancel("b")
    assert story.scheduler.num_queued == 0
    assert story.first_token("a") == []


def test_a_request_follows_one_that_waits_with_the_same_prefix() -> None:
    story = PlanStory("preble_plan", late_binding=True)
    story.ask("a", "a:9000")
    story.ask("b", "b:9000")
    story.ask("x", "doc:500 x:10")  # both are busy: it waits for w0
    story.ask("y", "long:400")  # and this for w1, where less waits
    story.ask("z", "doc:500 z:10")
    story.first_token("b")
    assert story.worker_of("y") == "w1"
    assert story.first_token("a") == ["x"]
    assert story.first_token("x") == ["z"]
    assert story.worker_of("z") == story.worker_of("x") == "w0"


# Depth first


def test_waiting_requests_of_one_prefix_run_together() -> None:
    order = {}
    for depth_first in (False, True):
        story = PlanStory(workers=["w0"], late_binding=True, depth_first=depth_first)
        story.ask("now", "now:9000")
        for name, document in (("p", "d1"), ("q", "d2"), ("r", "d1"), ("s", "d2")):
            story.ask(name, f"{document}:9000 {name}:9000")
        for number in range(5):
            story.first_token(list(story.placed)[number])
        order[depth_first] = "".join(list(story.placed)[1:])
    assert order == {False: "pqrs", True: "prqs"}


def test_depth_first_order_gives_way_to_who_waits_too_long() -> None:
    story = PlanStory(workers=["w0"], late_binding=True, depth_first=True)
    story.ask("first", "doc:9000 first:10")
    story.ask("old", "other:9000")
    story.now = 31.0
    story.ask("near", "doc:9000 near:8500")
    assert story.first_token("first") == ["old"]


def test_depth_first_order_prefers_the_neighbour() -> None:
    story = PlanStory(workers=["w0"], late_binding=True, depth_first=True)
    story.ask("first", "doc:9000 first:10")
    story.ask("old", "other:9000")
    story.ask("near", "doc:9000 near:8500")
    assert story.first_token("first") == ["near"]


# Stealing


def test_an_idle_worker_takes_what_waits_for_another() -> None:
    story = PlanStory("sticky", late_binding=True, stealing=True, profile=ONE_SECOND_PER_TOKEN)
    story.ask("warm", "doc:100", program="p")
    story.finish("warm")
    story.ask("a", "doc:100 a:9000", program="p")
    story.ask("b", "doc:100 b:300", program="p")
    assert story.worker_of("a") == "w0"
    assert (story.worker_of("b"), story.placed["b"].reason) == ("w1", "steal")
    assert story.placed["b"].costs == {"w1": 400.0, "w0": 9000.0 + 300.0}


def test_nothing_is_stolen_that_would_start_later() -> None:
    story = PlanStory("sticky", late_binding=True, stealing=True)
    story.ask("warm", "doc:20000", program="p")
    story.finish("warm")
    story.ask("a", "doc:20000 a:9000", program="p")
    assert story.ask("b", "doc:20000 b:300", program="p") == []
    assert story.first_token("a") == ["b"]
    assert story.worker_of("b") == "w0"


def test_what_would_be_computed_twice_has_to_pay_three_times_over() -> None:
    def reason(doc: str) -> str:
        story = PlanStory("sticky", late_binding=True, stealing=True, profile=ONE_SECOND_PER_TOKEN)
        story.ask("warm", doc, program="p")
        story.finish("warm")
        story.ask("a", f"{doc} a:9000", program="p")
        return story.placed["b"].reason if story.ask("b", f"{doc} b:300", program="p") else "waits"

    assert reason("doc:2000") == "steal"  # 2,300 + 3 · 2,000 is sooner than 9,300
    assert reason("doc:2500") == "waits"  # 2,800 + 3 · 2,500 is not


# Short first, decode gaps


def test_in_short_first_order_a_short_request_passes_a_long_one_but_not_for_ever() -> None:
    def order(later_s: float) -> list[str]:
        story = PlanStory(workers=["w0"], late_binding=True, short_first=True)
        story.ask("a", "a:9000")
        story.ask("long", "long:500")
        story.now += later_s
        story.ask("short", "short:10")
        return story.first_token("a")

    assert order(0.0) == ["short", "long"]
    assert order(48.0) == ["short", "long"]  # 49 s / 500 tokens < 1 s / 10 tokens
    assert order(50.0) == ["long", "short"]


def test_a_deadline_goes_before_what_is_short() -> None:
    story = PlanStory(workers=["w0"], late_binding=True, short_first=True)
    story.plan("due", None, deadline_at=100.0)
    story.ask("a", "a:9000")
    story.ask("short", "short:10")
    story.ask("due1", "long:500", program="due")
    assert story.first_token("a") == ["due1", "short"]


def test_a_long_prefill_waits_for_decodes_that_end_sooner() -> None:
    step_of_a_second = replace(ONE_SECOND_PER_TOKEN, floor_s=1.0)

    def sent(length: int, **mechanisms: Any) -> list[str]:
        story = PlanStory(workers=["w0"], profile=step_of_a_second, late_binding=True, **mechanisms)
        story.ask("a", "a:10")
        story.first_token("a")  # is expected to generate 45 tokens, a second each
        return story.ask("b", f"b:{length}")

    assert sent(46) == ["b"]
    assert sent(45, decode_gaps=True) == ["b"]
    assert sent(46, decode_gaps=True) == []


def test_a_long_prefill_waits_no_longer_than_the_decodes() -> None:
    story = PlanStory(workers=["w0"], late_binding=True, decode_gaps=True)
    story.ask("a", "a:10")
    story.first_token("a")
    assert story.ask("b", "b:1000") == []
    assert story.finish("a") == ["b"]


def test_decodes_give_way_when_more_requests_wait_than_they_are() -> None:
    step_of_a_second = replace(ONE_SECOND_PER_TOKEN, floor_s=1.0)
    story = PlanStory(workers=["w0"], profile=step_of_a_second, late_binding=True, decode_gaps=True)
    story.ask("a", "a:10")
    story.first_token("a")
    assert story.ask("b", "b:80") == []  # one stands still for 80 s, or one waits for 45 s
    assert story.ask("c", "c:80") == []
    assert story.dispatch() == ["b"]  # or two wait for 45 s


# Fairness, priority, deadlines


def test_a_tenant_that_floods_cannot_starve_another() -> None:
    story = PlanStory(workers=["w0"], open_limit=1, fairness=True)
    for i in range(10):
        story.ask(f"flood{i}", f"flood{i}:100", tenant="flood")
    for i in range(3):
        story.ask(f"quiet{i}", f"quiet{i}:100", tenant="quiet")
    served = ["flood0"]
    while len(served) < 8:
        (following,) = story.finish(served[-1])
        served.append(following)
    # Who comes later starts level: what the other had before is not made up for.
    assert served == ["flood0", "flood1", "quiet0", "flood2", "quiet1", "flood3", "quiet2", "flood4"]


def test_turns_are_by_cost_and_not_by_requests() -> None:
    story = PlanStory(workers=["w0"], open_limit=1, fairness=True)
    story.ask("now", "now:1", tenant="z")
    for i in range(4):
        story.ask(f"big{i}", f"big{i}:300", tenant="big")
        story.ask(f"small{i}", f"small{i}:100", tenant="small")
    served = ["now"]
    while len(served) < 7:
        served += story.finish(served[-1])
    assert served == ["now", "big0", "small0", "small1", "small2", "big1", "small3"]


def test_without_fairness_it_is_first_come_first_served() -> None:
    story = PlanStory(workers=["w0"], open_limit=1)
    for name, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        story.ask(name, f"{name}:10", tenant=tenant)
    assert story.finish("a") == ["b"]


def test_priority_goes_first_and_ages() -> None:
    story = PlanStory(workers=["w0"], open_limit=1)
    story.ask("running", "running:10")
    story.ask("low", "low:10", priority=0)
    story.now = 29.0
    story.ask("high", "high:10", priority=1)
    assert story.finish("running") == ["high"]
    story.now = 31.0
    story.ask("late", "late:10", priority=1)
    assert story.finish("high") == ["low"]  # 31 s of waiting are worth more than one level


def test_the_earliest_deadline_goes_first() -> None:
    story = PlanStory(workers=["w0"], open_limit=1)
    story.ask("running", "running:10")
    story.ask("whenever", "whenever:10")
    story.plan("b", deadline_at=50.0)
    story.ask("soon", "soon:10", program="b")
    story.plan("c", deadline_at=20.0)
    story.ask("sooner", "sooner:10", program="c")
    assert story.finish("running") == ["sooner"]
    story.finish("sooner")
    assert story.release("c") == ["soon"]


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


# Unequal workers


def test_the_faster_worker_gets_more_until_its_queue_makes_up_for_it() -> None:
    story = PlanStory("preble_plan", workers=())
    fast = replace(FREE_DECODE, token_s=0.25)
    for worker, profile in (("fast", fast), ("slow", FREE_DECODE)):
        story.scheduler.on_worker_up(WorkerId(worker), kv_tokens=100_000, profile=profile, now=0.0)
    for name in "abcd":
        story.ask(name, f"{name}:100")
    # On fast: 25; then 25 to wait, 25 of its own, 25 for the one it stalls: 75; then 50 + 75 = 125 > 100.
    assert [story.worker_of(name) for name in "abcd"] == ["fast", "fast", "slow", "fast"]
    assert story.placed["c"].costs == {"fast": 125.0, "slow": 100.0}
    assert story.placed["d"].costs == {"fast": 125.0, "slow": 300.0}


def test_a_match_counts_whole_pages_of_each_worker() -> None:
    story = PlanStory("preble_plan", workers=())
    for worker, page_size in (("w0", 64), ("w1", 1)):
        story.scheduler.on_worker_up(
            WorkerId(worker), kv_tokens=100_000, page_size=page_size, profile=FREE_DECODE, now=0.0
        )
    for name in ("a", "b"):
        story.ask(name, f"{name}:90")
    for name in ("a", "b"):
        story.finish(name)
    assert (story.worker_of("a"), story.worker_of("b")) == ("w0", "w1")
    story.ask("again_a", "a:90 x:10")
    story.ask("again_b", "b:90 x:10")
    assert (story.placed["again_a"].matched_len, story.placed["again_b"].matched_len) == (64, 90)


def test_a_small_cache_takes_only_what_fits() -> None:
    story = PlanStory("least_load", workers=(), kv_room=True)
    for worker, kv_tokens in (("big", 10_000), ("small", 1_000)):
        story.scheduler.on_worker_up(WorkerId(worker), kv_tokens=kv_tokens, profile=FREE_DECODE, now=0.0)
    for i in range(4):
        story.plan(f"p{i}", 1090)
        story.ask(f"r{i}", f"r{i}:10", program=f"p{i}")
    assert [story.worker_of(f"r{i}") for i in range(4)] == ["big", "small", "big", "big"]


def test_a_worker_that_died_comes_back_empty_and_takes_requests_again() -> None:
    story = PlanStory("preble_plan", late_binding=True, kv_room=True)
    story.ask("a", "doc:1000 a:10")
    story.finish("a")
    story.scheduler.on_worker_down(WorkerId("w0"), story.now)
    story.ask("b", "doc:1000 b:10")
    assert (story.worker_of("a"), story.worker_of("b")) == ("w0", "w1")
    story.finish("b")
    story.up("w0")
    story.ask("c", "other:1000 c:10")
    story.ask("d", "doc:1000 d:10")
    assert (story.worker_of("c"), story.worker_of("d")) == ("w0", "w1")
    assert (story.placed["c"].matched_len, story.placed["d"].matched_len) == (0, 1000)
