"""A chat: the user's turns of a row, answered one after the other.

A row: {"turns": ["...", "..."]}. The result: a list of answers.
Each prompt is the last one and its answer, continued; nothing is computed twice.
"""

import preble_sgl as ps

PERSONA = "You are a patient assistant who answers in at most two sentences."


@ps.program
async def multi_turn_chat(s: ps.State, turns: list[str], max_tokens: int = 64) -> list[str]:
    """Answer every turn."""
    s += ps.system(PERSONA)
    return [await s.ask(ps.user(turn), max_tokens=max_tokens) for turn in turns]
