"""Tree of thought: several next steps are proposed, each is rated, and the best is gone on from.

A row: {"problem": "...", "breadth": 3, "depth": 2}. The result: the answer.
All branches of one step share the problem and the steps so far; a rating continues the thought that it rates.
"""

from pydantic import BaseModel, Field

import preble_sgl as ps

RULES = "You solve problems step by step. When asked for a step, give one step in one sentence, no more."


class Rating(BaseModel):
    """How promising a thought is."""

    score: int = Field(ge=1, le=10)


@ps.program
async def tree_of_thought(
    s: ps.State, problem: str, breadth: int = 3, depth: int = 2, max_tokens: int = 64
) -> str:
    """Go `depth` steps, each the best of `breadth` thoughts, then answer."""
    s += ps.system(RULES) + ps.user(f"The problem: {problem}")
    for step in range(depth):
        s += ps.assistant("I see.")
        thoughts = s.fork(breadth, name=f"step{step}")
        ratings = await s.gather(_think(branch, i, max_tokens) for i, branch in enumerate(thoughts))
        best = ps.parse.argmax([rating.score for _, rating in ratings])
        s.join(thoughts)
        s += ps.user(f"The best step so far: {ratings[best][0]}")
    s += ps.assistant("I see.")
    return await s.ask(ps.user("Now give the answer."), max_tokens=max_tokens, name="answer")


async def _think(branch: ps.State, i: int, max_tokens: int) -> tuple[str, Rating]:
    """Propose the i-th step and rate it."""
    branch += ps.user(f"Proposal {i + 1}: what is the next step?")
    thought = await branch.gen(max_tokens=max_tokens, temperature=0.8)
    return thought, await branch.ask(ps.user("How promising is that, from 1 to 10?"), Rating, max_tokens=16)
