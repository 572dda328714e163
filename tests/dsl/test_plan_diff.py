"""Predicted against served, call by call; and what a batch teaches the next plan."""

import pytest

import preble_sgl as ps


@ps.program
async def asks(s: ps.State, text: str) -> str:
    s += ps.system("Be brief.")
    answer = await s.ask(ps.user(text), max_tokens=8, name="first")
    for _ in s.loop(max=3):
        if "done" in answer:
            return answer
        answer = await s.ask(ps.user("Go on."), max_tokens=8, name="more")
    return answer


ROWS = [{"text": "quick"}, {"text": "slow"}]


def answer(prompt: str) -> str:
    """Be done at once, or after two calls more."""
    return "done" if "quick" in prompt or prompt.count("Go on.") == 2 else "wait"


async def test_every_call_is_paired_with_what_was_said_of_it() -> None:
    backend = ps.ScriptedBackend({"*": answer})
    plan = await asks.aplan(ROWS, fleet=backend)
    batch = await asks.amap(ROWS, fleet=backend, plan=plan, progress=False)
    difference = plan.diff(batch)
    assert difference.is_within
    served = [call for call in difference.calls if call.served is not None]
    assert sorted(call.path for call in served) == [
        "asks[0]/first",
        "asks[1]/first",
        "asks[1]/more",
        "asks[1]/more1",
    ]
    first = next(call for call in served if call.path == "asks[0]/first")
    assert (first.predicted_len, first.predicted_cached) == (
        first.served.prompt_tokens,  # type: ignore[union-attr]
        first.served.cached_tokens,  # type: ignore[union-attr]
    )
    assert "calls: 4 served, within the predicted 2 – 4 – 8" in str(difference)


async def test_more_calls_than_any_reading_has_are_not_within() -> None:
    backend = ps.ScriptedBackend({"*": answer})
    plan = await asks.aplan(ROWS[:1], fleet=backend)

    @ps.program
    async def chatty(s: ps.State, text: str) -> None:
        for _ in range(9):
            await s.ask(ps.user(text))

    batch = await chatty.amap(ROWS[:1], fleet=backend, progress=False)
    difference = plan.diff(batch)
    assert not difference.is_within
    assert "calls: 9 served, NOT within the predicted 1 –" in str(difference)


async def test_a_batch_of_other_rows_is_refused() -> None:
    backend = ps.ScriptedBackend({"*": answer})
    plan = await asks.aplan(ROWS, fleet=backend)
    batch = await asks.amap(ROWS[:1], fleet=backend, progress=False)
    with pytest.raises(ps.InputError, match="the plan is of 2 rows, the batch of 1"):
        plan.diff(batch)


async def test_the_second_plan_expects_what_the_first_batch_did() -> None:
    backend = ps.ScriptedBackend({"*": answer})
    profile = ps.ProgramProfile()
    rows = [{"text": "slow"}] * 20
    before = await asks.aplan(rows, fleet=backend, profile=profile)
    batch = await asks.amap(rows, fleet=backend, plan=before, profile=profile, progress=False)
    after = await asks.aplan(rows, fleet=backend, profile=profile)
    served = batch.usage
    assert before.bounds.calls.expected == pytest.approx(20 * (1 / 2 + 2 / 4 + 3 / 8 + 4 / 8))
    assert abs(after.bounds.calls.expected - 60) < 4
    assert len(after.calls) == 60
    wrong_before = abs(before.bounds.prompt_tokens.expected - served.prompt_tokens)
    assert abs(after.bounds.prompt_tokens.expected - served.prompt_tokens) < 0.5 * wrong_before


async def test_tools_and_output_lengths_are_learnt() -> None:
    @ps.tool
    def look() -> str:
        """Look."""
        return "seen"

    @ps.program
    async def looks(s: ps.State) -> None:
        s += ps.user("Look.")
        await s.use(await s.act([look]))

    backend = ps.ScriptedBackend({"*": {"calls": [{"tool": "look", "arguments": {}}]}})
    profile = ps.ProgramProfile()
    batch = await looks.amap([{}], fleet=backend, profile=profile, progress=False)
    assert profile.tool_s("look") is not None
    line = batch[0].calls[0].line
    assert profile.output_len("looks", line) == backend.completions[0].usage.output_tokens


async def test_mermaid_draws_only_edges_of_calls_that_wait() -> None:
    plan = await asks.aplan(ROWS, fleet=ps.ScriptedBackend({}))
    text = plan.mermaid()
    assert text.startswith("flowchart TD\n")
    assert text.count("-->") == 2  # from the first to the next, and round the loop
