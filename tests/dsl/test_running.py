"""Programs run against a backend."""

import asyncio
from typing import Literal

import pytest
from pydantic import BaseModel

import preble_sgl as ps
from tests.fakes import FakeBackend


class Point(BaseModel):
    x: int
    y: int


async def test_every_call_extends_the_ids_of_the_one_before(backend: FakeBackend) -> None:
    @ps.program
    async def talk(s: ps.State) -> str:
        first = await s.ask(ps.user("one"))
        return first + await s.ask(ps.user("two"))

    assert await talk.arun(backend) == "finefine"
    first, second = (request.prompt for request in backend.requests)
    assert second[: len(first) + len(backend.outputs[0])] == first + backend.outputs[0]


async def test_map_shares_the_prefix_and_keeps_the_order_of_the_items(backend: FakeBackend) -> None:
    backend.answer = lambda prompt: prompt.rsplit("item ", 1)[1][0]

    @ps.program
    async def fan_out(s: ps.State, items: list[str]) -> list[str]:
        s += ps.system("Shared instructions.")
        return await s.map(items, lambda b, item: b.ask(ps.user(f"item {item}")))

    assert await fan_out.arun(backend, items=["c", "a", "b"]) == ["c", "a", "b"]
    paths = [request.call_path for request in backend.requests]
    assert paths == ["fan_out/fork0.0/call0", "fan_out/fork0.1/call0", "fan_out/fork0.2/call0"]
    assert len({request.program_id for request in backend.requests}) == 1


async def test_the_first_error_in_a_map_cancels_the_rest_and_is_raised(
    backend: FakeBackend,
) -> None:
    cancelled: list[int] = []

    async def branch(s: ps.State, item: int) -> None:
        if item == 1:
            raise KeyError("broken")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    @ps.program
    async def fails(s: ps.State) -> None:
        await s.map([0, 1, 2], branch)

    with pytest.raises(KeyError, match="broken"):
        await fails.arun(backend)
    assert sorted(cancelled) == [0, 2]


async def test_a_map_over_nothing_makes_no_call(backend: FakeBackend) -> None:
    @ps.program
    async def empty(s: ps.State) -> list[str]:
        return await s.map([], lambda b, item: b.ask(ps.user(item)))

    assert await empty.arun(backend) == []


async def test_a_typed_generation_sends_its_schema_and_returns_a_value(
    backend: FakeBackend,
) -> None:
    backend.answer = lambda prompt: '{"x": 1, "y": 2}'

    @ps.program
    async def locate(s: ps.State) -> Point:
        return await s.ask(ps.user("where?"), Point, max_tokens=20)

    assert await locate.arun(backend) == Point(x=1, y=2)
    sampling = backend.requests[0].sampling
    assert sampling.json_schema is not None
    assert '"required":["x","y"]' in sampling.json_schema
    assert sampling.max_new_tokens == 20


async def test_text_that_does_not_fit_its_type_is_an_output_error(backend: FakeBackend) -> None:
    backend.answer = lambda prompt: '{"x": 1'

    @ps.program
    async def locate(s: ps.State) -> Point:
        return await s.ask(ps.user("where?"), ps.gen(Point))

    with pytest.raises(ps.OutputError, match=r"not a valid Point .* raise max_tokens"):
        await locate.arun(backend)


async def test_select_scores_each_choice_behind_the_same_prompt(backend: FakeBackend) -> None:
    yes = backend.chat.encode("yes")
    backend.logprobs = lambda choice: -0.5 if choice == yes else -2.0

    @ps.program
    async def decide(s: ps.State) -> ps.Selection:
        s += ps.user("Well?")
        return await s.select(["no", "yes"])

    selection = await decide.arun(backend)
    assert selection == ps.Selection("yes", ("no", "yes"), (-2.0, -0.5))
    assert selection.margin == 1.5
    starts = {request.score_from for request in backend.requests}
    assert len(starts) == 1
    assert [request.sampling.max_new_tokens for request in backend.requests] == [0, 0]


async def test_sum_rule_punishes_length_and_mean_rule_does_not(backend: FakeBackend) -> None:
    backend.logprobs = lambda choice: -1.0 / len(choice) if len(choice) > 1 else -0.9
    long, short = "a considerably longer choice of words", "a"
    assert len(backend.chat.encode(long)) > 1 == len(backend.chat.encode(short))

    @ps.program
    async def decide(s: ps.State, rule: Literal["mean_logprob", "sum_logprob"]) -> str:
        s += ps.user("Well?")
        return (await s.select([long, short], rule=rule)).value

    assert await decide.arun(backend, rule="mean_logprob") == long
    assert await decide.arun(backend, rule="sum_logprob") == short


async def test_the_chosen_text_becomes_the_answer(backend: FakeBackend) -> None:
    @ps.program
    async def decide(s: ps.State) -> list[str]:
        s += ps.user("Well?")
        await s.select(["left", "right"])
        await s.ask(ps.user("Why?"))
        return [message["content"] for message in s.messages]

    assert await decide.arun(backend) == ["Well?", "left", "Why?", "fine"]


def test_programs_run_from_code_that_is_not_async(backend: FakeBackend) -> None:
    @ps.program
    async def hello(s: ps.State, name: str) -> str:
        return await s.ask(ps.user(name))

    assert hello.run(backend, "you") == "fine"
    assert hello.map([{"name": "a"}, {"name": "b"}], fleet=backend, progress=False).values == ["fine", "fine"]


def test_what_cannot_be_a_program_is_said_at_once() -> None:
    with pytest.raises(TypeError, match="async def"):
        ps.program(lambda s: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="needs the state"):

        @ps.program  # type: ignore[arg-type]
        async def nothing() -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "must be 0 or more"),
        ({"temperature": -1.0}, "must be 0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_token": 5}, "gen does not know max_token; it takes max_tokens"),
    ],
)
def test_bad_options_name_the_remedy(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.gen(**options)  # type: ignore[call-overload]


def test_bad_messages_and_choices_name_the_remedy() -> None:
    with pytest.raises(TypeError, match="takes a str, not int"):
        ps.user(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distinct, non-empty"):
        ps.select(["a", "a"])
    with pytest.raises(ValueError, match="regex or json_schema"):
        ps.gen(int, regex="[0-9]")
