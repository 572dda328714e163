"""Events of a running program: who, what, in order, and nothing after leaving."""

import asyncio
from contextlib import aclosing

import pytest

import preble_sgl as ps
from preble_sgl.core import Usage


@ps.tool
def double(number: int) -> int:
    """Double a number."""
    return 2 * number


@ps.program
async def both(s: ps.State, names: list[str]) -> list[str]:
    s += ps.system("Greet.", tools=[double])
    greetings = await s.map(names, lambda branch, name: branch.ask(ps.user(name)), name="greet")
    s += ps.user("How much is twice 4?")
    await s.use(await s.act([double], name="turn"))
    return greetings


SCRIPT = {
    "both/greet.*/call0": lambda prompt: "hello there",
    "both/turn": {"calls": [{"tool": "double", "arguments": {"number": 4}}]},
}


async def test_events_say_which_run_branch_and_call_they_belong_to() -> None:
    backend = ps.ScriptedBackend(SCRIPT)
    events = [event async for event in both.astream(backend, names=["a", "b"])]
    assert len({event.run for event in events}) == 1
    assert {event.row for event in events} == {None}
    deltas: dict[str, str] = {}
    for event in events:
        if isinstance(event, ps.TextDelta):
            deltas[event.call] = deltas.get(event.call, "") + event.text
            assert event.branch == event.call.rpartition("/")[0]
    ended = {event.call: event.text for event in events if isinstance(event, ps.CallEnded)}
    assert deltas == ended
    assert ended["both/greet.1/call0"] == "hello there"
    (tool_ended,) = [event for event in events if isinstance(event, ps.ToolEnded)]
    assert (tool_ended.tool, tool_ended.result, tool_ended.branch) == ("double", "8", "both")
    last = events[-1]
    assert isinstance(last, ps.RunEnded)
    assert last.value == ["hello there", "hello there"]
    assert last.usage == sum((done.usage for done in backend.completions), Usage())


async def test_an_error_of_the_body_is_raised_from_the_stream() -> None:
    @ps.program
    async def broken(s: ps.State) -> None:
        await s.ask(ps.user("first"))
        raise ZeroDivisionError("on purpose")

    seen: list[object] = []

    async def watch() -> None:
        async for event in broken.astream(ps.ScriptedBackend({"*": "x"})):
            seen.append(event)

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        await watch()
    assert isinstance(seen[-1], ps.CallEnded)


async def test_leaving_early_cancels_the_run() -> None:
    cancelled = asyncio.Event()

    @ps.program
    async def endless(s: ps.State) -> None:
        await s.ask(ps.user("first"))
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with aclosing(endless.astream(ps.ScriptedBackend({"*": "x"}))) as events:
        async for event in events:
            if isinstance(event, ps.CallEnded):
                break
    assert cancelled.is_set()


async def test_rows_of_a_batch_have_their_number_in_every_call_path() -> None:
    backend = ps.ScriptedBackend({"*": "x"})

    @ps.program
    async def ask(s: ps.State, text: str) -> str:
        return await s.ask(ps.user(text), name="only")

    batch = await ask.amap([{"text": "a"}, {"text": "b"}], fleet=backend, progress=False)
    assert sorted(backend.calls) == ["ask[0]/only", "ask[1]/only"]
    assert [result.calls[0].path for result in batch] == ["ask[0]/only", "ask[1]/only"]
