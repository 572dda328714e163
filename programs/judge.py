"""A judge: one branch per dimension writes a note, then a verdict is given with all notes in view.

A row: {"article": "...", "dimensions": ["...", "..."]}. The result: a `Verdict`.
The branches and the verdict share the rubric and the article.
"""

from typing import Literal

from pydantic import BaseModel, Field

import preble_sgl as ps

RUBRIC = (
    "You review source code for a team that has to live with it for years. "
    "Judge one dimension at a time, name the line that decides, and do not praise what is merely usual."
)


class Verdict(BaseModel):
    """What the judge decides."""

    score: int = Field(ge=1, le=5)
    decision: Literal["accept", "revise", "reject"]
    reason: str = Field(max_length=40)


@ps.program
async def judge(s: ps.State, article: str, dimensions: list[str], max_tokens: int = 24) -> Verdict:
    """Note every dimension side by side, then decide."""
    s += ps.system(RUBRIC)
    s += ps.user(f"The code under review:\n\n{article}")
    notes = await s.map(
        dimensions, lambda branch, name: branch.ask(ps.user(f"Dimension: {name}"), max_tokens=max_tokens)
    )
    s += ps.user(
        "Your notes:\n" + "\n".join(f"{name}: {note}" for name, note in zip(dimensions, notes, strict=True))
    )
    return await s.gen(Verdict, max_tokens=96)
