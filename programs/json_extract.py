"""Typed extraction: a document is read once, and several records are filled in from it side by side.

A row: {"document": "..."}. The result: a `Report`; what the document does not say is None.
All records share the instructions and the document.
"""

from pydantic import BaseModel, Field

import preble_sgl as ps

INSTRUCTIONS = (
    "You extract facts from documents as JSON. Use only what the document says; a field of which it says "
    "nothing is null. Copy names and numbers exactly."
)


class Party(BaseModel):
    """Who is involved."""

    name: str = Field(max_length=60)
    role: str | None = Field(max_length=40)


class Terms(BaseModel):
    """What was agreed."""

    amount: float | None
    currency: str | None = Field(max_length=3)
    due_date: str | None = Field(max_length=10)


class Report(BaseModel):
    """All that was found."""

    parties: list[Party]
    terms: Terms
    summary: str


@ps.program
async def json_extract(s: ps.State, document: str, max_tokens: int = 192) -> Report:
    """Extract the parties, the terms and a summary, each on a branch of its own."""
    s += ps.system(INSTRUCTIONS) + ps.user(f"The document:\n\n{document}") + ps.assistant("What do you need?")
    parties, terms, summary = s.fork(3, name="record")
    found = await s.gather(
        [
            parties.ask(ps.user("The parties."), list[Party], max_tokens=max_tokens),
            terms.ask(ps.user("The terms."), Terms, max_tokens=max_tokens),
            summary.ask(ps.user("One sentence on what it is about."), max_tokens=max_tokens),
        ]
    )
    s.join([parties, terms, summary])
    return Report.model_construct(parties=found[0], terms=found[1], summary=found[2])
