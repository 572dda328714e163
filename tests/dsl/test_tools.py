"""Tools: what the model is told, what it may write, and what comes of bad calls."""

import asyncio
from typing import Any, Literal

import orjson
import pytest
from pydantic import BaseModel

import preble_sgl as ps
from preble_sgl.dsl.tools import act_op


class Place(BaseModel):
    city: str


@ps.tool
async def weather(place: Place, unit: Literal["c", "f"] = "c") -> str:
    """Tell the weather
    of a place."""
    return f"sunny in {place.city}, 20 {unit}"


@ps.tool(timeout_s=0.01)
async def slow() -> str:
    """Take long."""
    await asyncio.sleep(3600)
    return "never"


@ps.tool
def fails() -> str:
    """Fail."""
    raise KeyError("no such thing")


def turn(name: str, **arguments: Any) -> dict[str, Any]:
    return {"calls": [{"tool": name, "arguments": arguments}]}


@ps.program
async def agent(s: ps.State, tools: list[Any]) -> str:
    s += ps.system("Use tools.", tools=tools) + ps.user("Go.")
    for _ in s.loop(max=3):
        step = await s.act(tools)
        if step.final is not None:
            return step.final
        await s.use(step)
    return "gave up"


async def test_a_tool_is_called_and_the_model_sees_the_result() -> None:
    answers = iter([turn("weather", place={"city": "Rome"}), {"final": "sunny"}])
    backend = ps.ScriptedBackend({"*": answers})
    assert await agent.arun(backend, [weather]) == "sunny"
    assert backend.requests[1].messages[-1] == {"role": "tool", "content": "sunny in Rome, 20 c"}
    assert backend.pauses == [1.0]


async def test_the_model_is_told_name_docstring_and_schema() -> None:
    backend = ps.ScriptedBackend({"*": {"final": "x"}})
    await agent.arun(backend, [weather])
    told = backend.requests[0].messages[0]["content"]
    assert "- weather: Tell the weather of a place." in told
    assert '"enum":["c","f"]' in told


@pytest.mark.parametrize(
    ("step", "shown"),
    [
        (turn("fails"), "error: fails: KeyError: 'no such thing'"),
        (turn("slow"), "error: slow: no result within 0.01 s"),
        (turn("weather", place={"city": "Rome"}, unit="k"), "error: weather: ValidationError"),
        (turn("weather", place={"city": "Rome"}, sky=1), "error: weather: ValidationError"),
    ],
)
async def test_what_goes_wrong_in_a_tool_is_a_result_that_the_model_sees(
    step: dict[str, Any], shown: str
) -> None:
    backend = ps.ScriptedBackend({"*": iter([step, {"final": "sorry"}])})
    assert await agent.arun(backend, [weather, slow, fails]) == "sorry"
    assert backend.requests[1].messages[-1]["content"].startswith(shown)


async def test_a_failing_tool_is_tried_again_as_often_as_it_says() -> None:
    tries = 0

    @ps.tool(retries=2)
    def third_time() -> str:
        """Work the third time."""
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("not yet")
        return "worked"

    backend = ps.ScriptedBackend({"*": iter([turn("third_time"), {"final": "x"}])})
    await agent.arun(backend, [third_time])
    assert backend.requests[1].messages[-1]["content"] == "worked"


async def test_a_long_result_is_cut_to_what_the_tool_allows() -> None:
    @ps.tool(max_len=10)
    def long() -> str:
        """Say much."""
        return "word " * 100

    backend = ps.ScriptedBackend({"*": iter([turn("long"), {"final": "x"}])})
    await agent.arun(backend, [long])
    assert backend.requests[1].messages[-1]["content"] == "word word "


async def test_at_most_so_many_tools_run_at_once() -> None:
    running = most = 0

    @ps.tool
    async def counted(i: int) -> int:
        """Count."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return i

    @ps.program
    async def many(s: ps.State) -> list[str]:
        s += ps.user("Go.")
        return await s.use(await s.act([counted], max_calls=8, max_tokens=1000), max_parallel=3)

    calls = [{"tool": "counted", "arguments": {"i": i}} for i in range(8)]
    assert await many.arun(ps.ScriptedBackend({"*": {"calls": calls}})) == [str(i) for i in range(8)]
    assert most == 3


def test_the_grammar_allows_tools_and_a_final_answer_and_bounds_the_calls() -> None:
    op = act_op([weather], Place, 2, {})
    schema = orjson.loads(str(op.params.json_schema))
    calls, final = schema["anyOf"]
    assert calls["properties"]["calls"]["maxItems"] == 2
    assert list(final["properties"]) == ["final"]
    assert set(schema["$defs"]) == {"weather.Place"}


async def test_a_typed_final_answer_comes_back_as_its_type() -> None:
    @ps.program
    async def typed(s: ps.State) -> Place | None:
        s += ps.user("Where?")
        return (await s.act([weather], Place)).final

    assert await typed.arun(ps.ScriptedBackend({"*": {"final": {"city": "Oslo"}}})) == Place(city="Oslo")


def test_tools_without_docstring_or_types_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a docstring"):
        ps.tool(lambda: 1)

    @ps.tool
    def untyped(x) -> int:  # type: ignore[no-untyped-def]
        """Take anything."""
        return 1

    with pytest.raises(TypeError, match="parameter x of untyped needs a type"):
        _ = untyped.schema
    with pytest.raises(ValueError, match="tools of different names"):
        act_op([weather, weather], str, 1, {})
