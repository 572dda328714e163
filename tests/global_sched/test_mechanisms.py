"""What the scheduler does besides asking its policy: each mechanism in stories with exact numbers."""

from dataclasses import replace
from typing import Any

from preble_sgl.core import WorkerId
from tests.global_sched.plan_story import PlanStory
from tests.global_sched.stories import FREE_DECODE, ONE_SECOND_PER_TOKEN

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
