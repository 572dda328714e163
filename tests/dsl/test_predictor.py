"""Who says how long an answer may get: the program, a predictor, or the profile of the call site."""

import preble_sgl as ps
from preble_sgl.core import Request
from preble_sgl.dsl.chat import ChatFormat
from tests.fakes import FakeBackend


@ps.program
async def ask(s: ps.State, question: str) -> str:
    s += ps.user(question)
    return await s.gen(max_tokens=64)


async def expected(chat: ChatFormat, **options: object) -> list[int | None]:
    """Return what the calls of two rows said that they expect."""
    backend = FakeBackend(chat)
    rows = [{"question": "Why?"}, {"question": "How?"}]
    await ask.amap(rows, fleet=backend, progress=False, **options)  # type: ignore[arg-type]
    return [request.expected_output_len for request in backend.requests]


async def test_nothing_is_expected_of_a_call_that_nobody_knows(chat: ChatFormat) -> None:
    assert await expected(chat) == [None, None]


async def test_a_second_run_expects_what_the_first_has_shown_at_the_call_site(chat: ChatFormat) -> None:
    profile = ps.ProgramProfile()
    assert await expected(chat, profile=profile) == [None, None]
    answer_len = len(chat.encode("fine")) + 1
    assert await expected(chat, profile=profile) == [answer_len, answer_len]


async def test_a_predictor_goes_before_the_profile_and_may_not_know(chat: ChatFormat) -> None:
    profile = ps.ProgramProfile()
    await expected(chat, profile=profile)

    def predictor(request: Request) -> float | None:
        return 40.6 if "Why" in chat.decode(request.prompt) else None

    answer_len = len(chat.encode("fine")) + 1
    found = await expected(chat, profile=profile, predictor=predictor)
    assert sorted(length or 0 for length in found) == sorted([41, answer_len])
    assert await expected(chat, predictor=lambda request: None) == [None, None]
