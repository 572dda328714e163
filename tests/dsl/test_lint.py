"""Where sharing ends too early: the line, the reason, and the gain."""

from typing import Any

import preble_sgl as ps
from preble_sgl.dsl.chat import ChatFormat

LONG = "Answer in one sentence, in plain words, without opinions, and cite the paragraph. " * 6


async def advice(program: ps.Program[..., Any], chat: ChatFormat) -> tuple[str, ...]:
    """Return what the lint says of three rows."""
    plan = await program.aplan([{"row": i} for i in range(3)], fleet=chat)
    assert all(line in plan.explain() for line in plan.lint())
    return plan.lint()


async def test_a_row_id_in_front_of_a_long_text_is_named_with_what_it_costs(chat: ChatFormat) -> None:
    @ps.program
    async def id_first(s: ps.State, row: int) -> None:
        s += ps.system(f"Request {row}.\n{LONG}")
        await s.ask(ps.user("Go."), max_tokens=4)

    (line,) = await advice(id_first, chat)
    length = len(chat.encode(LONG))
    assert line.startswith("test_lint.py:")
    assert "what differs from row to row stands before" in line
    said = int(line.split("stands before ")[1].split()[0].replace(",", ""))
    assert abs(said - length) < 8
    assert f"{2 * said:,} tokens less would be computed" in line


async def test_a_message_that_differs_before_one_that_does_not_is_named_with_both(
    chat: ChatFormat,
) -> None:
    @ps.program
    async def question_first(s: ps.State, row: int) -> None:
        s += ps.user(f"Question {row}")
        s += ps.user(LONG)
        await s.gen(max_tokens=4)

    (line,) = await advice(question_first, chat)
    assert "differs from row to row and stands before" in line
    assert line.count("test_lint.py:") == 2


async def test_the_right_order_and_short_texts_get_no_advice(chat: ChatFormat) -> None:
    @ps.program
    async def right(s: ps.State, row: int) -> None:
        s += ps.system(LONG)
        s += ps.user(f"Question {row}")
        await s.ask(ps.user("Short."), max_tokens=4)

    assert await advice(right, chat) == ()
