"""Reading on with every answer: branches, loops, choices, types, tools; and saying what cannot be read."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import preble_sgl as ps
from preble_sgl.dsl.bounds import Bounds
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan


async def plan_of(program: ps.Program[..., Any], chat: ChatFormat, **arguments: Any) -> Plan:
    return await program.aplan([arguments], fleet=chat)


def calls(plan: Plan) -> tuple[int, int | None]:
    return plan.bounds.calls.lower, plan.bounds.calls.upper


@pytest.mark.parametrize(
    "question",
    [
        lambda text: text == "yes",
        lambda text: text != "yes",
        lambda text: "yes" in text,
        lambda text: bool(text),
        lambda text: text[0] == "y",
        lambda text: text.strip().lower().startswith("y"),
        lambda text: text.replace("a", "b").endswith("."),
        lambda text: text.split(":")[1] == "yes",
        lambda text: text.partition(":")[2].isdigit(),
        lambda text: ("Answer: " + text) == "Answer: yes",
        lambda text: text < "m",
        lambda text: ps.parse.yes_no(text),
        lambda text: ps.parse.match(r"(\d+)", text) is not None,
        lambda text: ps.parse.number(text) > 3,
    ],
)
async def test_a_question_with_two_answers_is_read_on_with_both(
    chat: ChatFormat, question: Callable[[Any], object]
) -> None:
    @ps.program
    async def asks(s: ps.State) -> str:
        text = await s.ask(ps.user("Yes or no?"), max_tokens=3)
        if question(text):
            return await s.ask(ps.user("Why?"), max_tokens=3)
        return text

    plan = await plan_of(asks, chat)
    assert calls(plan) == (1, 2)
    assert plan.bounds.calls.expected == 1.5
    assert plan.warnings == ()


async def test_a_loop_is_bounded_by_its_limit(chat: ChatFormat) -> None:
    @ps.program
    async def repeats(s: ps.State) -> str:
        for _ in s.loop(max=5):
            if "done" in await s.ask(ps.user("Go on."), max_tokens=3):
                return "finished"
        raise RuntimeError("not done after 5 rounds")

    plan = await plan_of(repeats, chat)
    assert calls(plan) == (1, 5)
    assert len(plan.traces[0].readings) == 6


async def test_a_loop_without_a_limit_has_no_upper_bound_and_says_where(chat: ChatFormat) -> None:
    @ps.program
    async def forever(s: ps.State) -> None:
        while "done" not in await s.ask(ps.user("Go on."), max_tokens=3):
            pass

    plan = await plan_of(forever, chat)
    assert calls(plan) == (1, None)
    assert "use s.loop(max=...)" in plan.explain()


async def test_the_branches_of_a_selection_are_read_one_by_one(chat: ChatFormat) -> None:
    @ps.program
    async def routes(s: ps.State) -> str:
        s += ps.user("Which expert?")
        match (await s.select(["math", "code", "law"])).value:
            case "math":
                return await s.ask(ps.user("You are a mathematician."), max_tokens=3)
            case "code":
                await s.ask(ps.user("Write it."), max_tokens=3)
                return await s.ask(ps.user("Test it."), max_tokens=3)
        return "no expert"

    plan = await plan_of(routes, chat)
    assert len(plan.traces[0].readings) == 3
    assert calls(plan) == (3, 5)


async def test_a_choice_that_is_only_written_down_is_no_decision(chat: ChatFormat) -> None:
    @ps.program
    async def echoes(s: ps.State) -> str:
        word = await s.ask(ps.user("Colour?"), choices=["red", "green"])
        return await s.ask(ps.user(f"Why {word}?"), max_tokens=3)

    plan = await plan_of(echoes, chat)
    assert len(plan.traces[0].readings) == 1
    assert calls(plan) == (2, 2)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Task(BaseModel):
    name: str
    urgent: bool


class Work(BaseModel):
    tasks: list[Task] = Field(max_length=3)
    colour: Colour
    kind: Literal["a", "b"]
    note: str | None
    score: int = Field(ge=1, le=4)


@pytest.mark.parametrize(
    ("look", "readings"),
    [
        (lambda work: [task.name for task in work.tasks], 4),
        (lambda work: [task.name for task in work.tasks[:2]], 3),
        (lambda work: work.colour is Colour.RED, 2),
        (lambda work: work.kind == "a", 2),
        (lambda work: {"a": 1, "b": 2}[work.kind], 2),
        (lambda work: work.note is None, 2),
        (lambda work: work.score >= 3, 2),
        (lambda work: range(work.score), 4),
        (lambda work: work.tasks[0].urgent, 2),
        (lambda work: f"{work.score} {work.tasks} {work.kind}", 1),
        (lambda work: isinstance(work, Work) or 1 / 0, 1),
    ],
)
async def test_fields_of_a_typed_value_have_the_answers_that_the_type_allows(
    chat: ChatFormat, look: Callable[[Any], object], readings: int
) -> None:
    @ps.program
    async def works(s: ps.State) -> None:
        look(await s.ask(ps.user("Plan."), Work, max_tokens=40))

    plan = await plan_of(works, chat)
    assert plan.traces[0].stopped_at is None
    assert len(plan.traces[0].readings) == readings


async def test_a_fan_out_over_generated_items_has_the_bounds_of_their_list(chat: ChatFormat) -> None:
    @ps.program
    async def fans_out(s: ps.State) -> None:
        tasks = await s.ask(ps.user("Plan."), Annotated[list[str], Field(min_length=1, max_length=4)])
        await s.map(tasks, lambda branch, task: branch.ask(ps.user(task), max_tokens=3))

    assert calls(await plan_of(fans_out, chat)) == (2, 5)


async def test_a_fan_out_over_a_list_of_any_length_is_open(chat: ChatFormat) -> None:
    @ps.program
    async def fans_out(s: ps.State) -> None:
        tasks = await s.ask(ps.user("Plan."), list[str])
        await s.map(tasks, lambda branch, task: branch.ask(ps.user(task), max_tokens=3))

    plan = await plan_of(fans_out, chat)
    assert calls(plan) == (1, None)
    assert "bound it (max_length=)" in str(plan.traces[0].stopped_at)


@dataclass
class Step:
    done: bool


async def test_dataclasses_are_read_like_models(chat: ChatFormat) -> None:
    @ps.program
    async def steps(s: ps.State) -> None:
        if not (await s.ask(ps.user("Step."), Step)).done:
            await s.ask(ps.user("Again."), max_tokens=3)

    assert calls(await plan_of(steps, chat)) == (1, 2)


def _look_up(name: str) -> str:
    raise AssertionError("a tool is not called while a plan is made")


@ps.tool(max_len=50)
def look_up(name: str) -> str:
    """Look a name up."""
    return _look_up(name)


@ps.program
async def agent(s: ps.State, question: str) -> str:
    s += ps.system("You look things up.", tools=[look_up]) + ps.user(question)
    for _ in s.loop(max=4):
        turn = await s.act([look_up], max_tokens=30)
        if turn.final is not None:
            return turn.final
        await s.use(turn)
    return "no answer"


async def test_an_agent_is_read_for_every_number_of_steps_without_calling_a_tool(chat: ChatFormat) -> None:
    plan = await plan_of(agent, chat, question="Who?")
    assert calls(plan) == (1, 4)
    longest = max(plan.traces[0].readings, key=lambda reading: len(reading.calls))
    lengths = [len(call.request.prompt) for call in longest.calls]
    assert all(later > earlier + 50 for earlier, later in pairwise(lengths))


async def test_a_tool_that_is_called_directly_is_a_stub_in_a_plan(chat: ChatFormat) -> None:
    @ps.program
    async def direct(s: ps.State) -> str:
        found = await look_up("x")
        return await s.ask(ps.user(f"Found {found}."), max_tokens=3)

    plan = await plan_of(direct, chat)
    assert plan.bounds.prompt_tokens.upper - plan.bounds.prompt_tokens.lower == 50  # type: ignore[operator]


async def test_effects_do_not_happen_in_a_plan(chat: ChatFormat) -> None:
    done: list[str] = []
    save = ps.effect(done.append)

    @ps.program
    async def saves(s: ps.State) -> None:
        save(await s.ask(ps.user("What?"), max_tokens=3))

    await plan_of(saves, chat)
    assert done == []


@pytest.mark.parametrize(
    "look",
    [
        lambda text: "yes" in "\n".join([text, text]),
        lambda text: re.search(r"\d+", text) is not None,
        lambda text: re.match("Finish", f"{text}") is not None,
        lambda text: len(f"{text}") > 20,
        lambda text: "Finish" in f"{text}",
    ],
)
async def test_a_look_at_a_generated_text_that_cannot_be_seen_is_found_out(
    chat: ChatFormat, look: Callable[[Any], object]
) -> None:
    @ps.program
    async def peeks(s: ps.State) -> None:
        text = await s.ask(ps.user("Finish with yes or no."), max_tokens=3)
        if look(text):
            await s.ask(ps.user("more"), max_tokens=3)

    (warning,) = (await plan_of(peeks, chat)).warnings
    assert re.match(r"test_explore\.py:\d+: what happens here depends on a generated text", warning)


async def test_clock_and_chance_are_named_with_their_line(chat: ChatFormat) -> None:
    @ps.program
    async def unsteady(s: ps.State) -> None:
        s += ps.system(f"It is {time.time_ns()}.")
        await s.ask(ps.user(random.choice(["a", "b"])), max_tokens=3)

    warnings = (await plan_of(unsteady, chat)).warnings
    assert any("the prompt is different each time" in warning for warning in warnings)
    assert any("uses time.time_ns" in warning for warning in warnings)
    assert any("uses random.choice" in warning for warning in warnings)


async def test_what_helpers_do_differently_each_time_is_found_by_reading_twice(chat: ChatFormat) -> None:
    numbers = iter(range(100))

    def stamp() -> str:
        return f"Request {next(numbers)}."

    @ps.program
    async def stamps(s: ps.State) -> None:
        await s.ask(ps.user(stamp()), max_tokens=3)

    (warning,) = (await plan_of(stamps, chat)).warnings
    assert "the prompt is different each time" in warning


async def test_a_program_with_too_many_ways_has_no_upper_bound(chat: ChatFormat) -> None:
    @ps.program
    async def wild(s: ps.State) -> None:
        for i in range(10):
            if "yes" in await s.ask(ps.user(f"Question {i}?"), max_tokens=2):
                await s.ask(ps.user("Why?"), max_tokens=2)

    plan = await plan_of(wild, chat)
    assert not plan.traces[0].is_complete
    assert calls(plan) == (1, None)
    assert "1 rows can go more ways than were read" in plan.explain()


async def test_ways_are_weighed_by_what_earlier_runs_did(chat: ChatFormat) -> None:
    @ps.program
    async def asks(s: ps.State) -> None:
        if await s.ask(ps.user("Well?"), choices=["yes", "no"]) == "yes":
            await s.ask(ps.user("Why?"), max_tokens=3)

    profile = ps.ProgramProfile()
    plan = await asks.aplan([{}], fleet=chat, profile=profile)
    assert plan.bounds.calls == Bounds(1, 1.5, 2)
    (decision,) = plan.traces[0].readings[0].decisions
    for _ in range(8):
        profile.learn_branch("asks", decision.site, 0, "no")
    plan = await asks.aplan([{}], fleet=chat, profile=profile)
    assert plan.bounds.calls.expected == pytest.approx(1.1)  # (0 + 1) of (8 + 2)
    assert len(plan.calls) == 1


async def test_rows_of_one_template_are_checked_once(chat: ChatFormat) -> None:
    read = 0

    @ps.program
    async def counted(s: ps.State, text: str) -> None:
        nonlocal read
        read += 1
        await s.ask(ps.user(text), max_tokens=3)

    await counted.aplan([{"text": str(i)} for i in range(20)], fleet=chat)
    assert read == 20 + 2
