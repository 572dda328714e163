"""What fails, or goes wrong silently, in SGLang's own frontend language, and has to work here."""

from typing import Any

import pytest

import preble_sgl as ps
from preble_sgl.dsl.chat import ChatFormat

INSTRUCTIONS = "You answer questions about the tide tables of small harbours. " * 3


async def shared_len(program: ps.Program[..., Any], chat: ChatFormat) -> int:
    """Return how many tokens two rows with different questions share, by the plan."""
    plan = await program.aplan([{"q": " When? "}, {"q": " How high? "}], fleet=chat)
    assert plan.traces[0].stopped_at is None
    return plan.reusable_tokens


async def test_an_f_string_on_an_argument_is_read_like_any_other_text(chat: ChatFormat) -> None:
    @ps.program
    async def joined(s: ps.State, q: str) -> str:
        s += ps.system(INSTRUCTIONS) + ps.user("Q: " + q)
        return await s.gen(max_tokens=4)

    @ps.program
    async def formatted(s: ps.State, q: str) -> str:
        s += ps.system(INSTRUCTIONS) + ps.user(f"Q: {q}")
        return await s.gen(max_tokens=4)

    assert await shared_len(joined, chat) == await shared_len(formatted, chat) > 30


async def test_string_methods_and_lengths_of_arguments_are_known(chat: ChatFormat) -> None:
    @ps.program
    async def stripped(s: ps.State, q: str) -> str:
        q = q.strip().lower()
        s += ps.system(INSTRUCTIONS)
        if len(q) > 5:
            return await s.ask(ps.user(q), max_tokens=4)
        return await s.ask(ps.user("short: " + q), max_tokens=4)

    assert await shared_len(stripped, chat) > 30


async def test_a_document_before_the_instructions_is_shared_by_rows_of_one_document(chat: ChatFormat) -> None:
    @ps.program
    async def document_first(s: ps.State, document: str, q: str) -> str:
        s += ps.user(document + INSTRUCTIONS + q)
        return await s.gen(max_tokens=4)

    rows = [{"document": "High water at noon. " * 50, "q": q} for q in ("When?", "How high?")]
    plan = await document_first.aplan(rows, fleet=chat)
    assert plan.reusable_tokens > 200


async def test_both_branches_on_a_generated_value_are_read(chat: ChatFormat) -> None:
    @ps.program
    async def branches(s: ps.State, q: str) -> str:
        first = await s.ask(ps.user(q), max_tokens=4)
        if first == "yes":
            return await s.ask(ps.user("Why?"), max_tokens=4)
        return await s.ask(ps.user("Why not, and since when?"), max_tokens=4)

    plan = await branches.aplan([{"q": "Well?"}], fleet=chat)
    lines = {call.line for reading in plan.traces[0].readings for call in reading.calls}
    assert len(lines) == 3


async def test_a_loop_until_a_generated_word_is_read_and_bounded(chat: ChatFormat) -> None:
    @ps.program
    async def loops(s: ps.State, q: str) -> str:
        act = await s.ask(ps.user(q), max_tokens=4)
        for _ in s.loop(max=3):
            if "finish" in act:
                break
            act = await s.ask(ps.user("next"), max_tokens=4)
        return act

    plan = await loops.aplan([{"q": "Go."}], fleet=chat)
    assert (plan.bounds.calls.lower, plan.bounds.calls.upper) == (1, 4)


async def test_an_error_of_the_backend_is_raised_where_the_value_would_be_used() -> None:
    @ps.program
    async def uses(s: ps.State) -> str:
        return (await s.ask(ps.user("first"))).upper()

    backend = ps.ScriptedBackend({"*": ps.RequestRejected("HTTP 500")})
    with pytest.raises(ps.RequestRejected, match="HTTP 500") as raised:
        await uses.arun(backend)
    assert raised.value.call_path == "uses/call0"
    batch = await uses.amap([{}], fleet=backend, progress=False)
    assert [result.ok for result in batch] == [False]


async def test_a_fork_right_after_the_first_text_shares_it_every_time() -> None:
    @ps.program
    async def asks(s: ps.State) -> list[str]:
        s += ps.system(INSTRUCTIONS)
        return await s.map(range(3), lambda branch, i: branch.ask(ps.user(f"{i}?"), max_tokens=4))

    for _ in range(50):
        backend = ps.ScriptedBackend({"*": "x"})
        await asks.arun(backend)
        first, *others = (done.usage.cached_tokens for done in backend.completions)
        assert first == 0
        assert all(cached > len(INSTRUCTIONS) for cached in others)


async def test_a_batch_of_one_row_shares_within_the_row() -> None:
    @ps.program
    async def chats(s: ps.State) -> None:
        s += ps.system(INSTRUCTIONS)
        await s.ask(ps.user("one"))
        await s.ask(ps.user("two"))

    backend = ps.ScriptedBackend({"*": "x"})
    plan = await chats.aplan([{}], fleet=backend)
    batch = await chats.amap([{}], fleet=backend, plan=plan, progress=False)
    assert plan.reusable_tokens > len(INSTRUCTIONS)
    assert plan.diff(batch).is_within


async def test_generations_go_on_from_exact_tokens_not_from_text_tokenised_again(chat: ChatFormat) -> None:
    odd = chat.encode(" re") + chat.encode("peat")
    assert odd != chat.encode(" repeat")
    backend = ps.ScriptedBackend(lambda request, prompt: " repeat", chat=chat)

    @ps.program
    async def twice(s: ps.State) -> None:
        await s.ask(ps.user("one"))
        await s.ask(ps.user("two"))

    await twice.arun(backend)
    first, second = backend.requests
    output = backend.completions[0].output_ids
    assert second.prompt[: len(first.prompt) + len(output)] == first.prompt + output
