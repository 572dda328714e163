"""Multi-chain reasoning: several chains of thought side by side, then one answer that has read them all.

A row: {"question": "...", "chains": 4}. The result: the answer.
The chains share the question; the last call shares it too and reads what they generated.
"""

import preble_sgl as ps

RULES = "You reason carefully. Say each thing once."
STYLES = (
    "Work forwards from what is given.",
    "Work backwards from what is asked.",
    "Try a small example first.",
    "Look for what could be wrong with the obvious answer.",
    "Draw on a similar problem that you know.",
)


@ps.program
async def multi_chain(s: ps.State, question: str, chains: int = 4, max_tokens: int = 96) -> str:
    """Reason in several ways, then answer once."""
    s += ps.system(RULES) + ps.user(f"The question: {question}") + ps.assistant("How shall I go about it?")
    thoughts = await s.map(
        STYLES[:chains], lambda b, style: b.ask(ps.user(style), max_tokens=max_tokens), name="chain"
    )
    listed = "\n\n".join(f"Way {i}: {thought}" for i, thought in enumerate(thoughts, 1))
    return await s.ask(
        ps.user(f"These are several ways to see it:\n\n{listed}\n\nWeigh them and give one answer."),
        max_tokens=max_tokens,
        name="answer",
    )
