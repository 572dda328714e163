"""A debate: each debater answers, reads the others and answers again; a moderator decides.

A row: {"question": "...", "debaters": ["...", "..."], "rounds": 2}. The result: the moderator's decision.
Every debater keeps one growing conversation, so each round adds to a prefix that is cached.
"""

import preble_sgl as ps

RULES = (
    "You take part in a debate. Say what you think and why in at most three sentences. "
    "When another has convinced you, say so."
)


@ps.program
async def debate(
    s: ps.State, question: str, debaters: list[str], rounds: int = 2, max_tokens: int = 96
) -> str:
    """Let all speak side by side in every round, then decide."""
    s += ps.system(RULES) + ps.user(f"The question: {question}") + ps.assistant("I am ready.")
    branches = s.fork(len(debaters), name="debater")
    says = [f"You are {who}. What is your position?" for who in debaters]
    for _ in range(rounds):
        answers = await _round(s, branches, says, max_tokens)
        told = "\n\n".join(f"{who}: {answer}" for who, answer in zip(debaters, answers, strict=True))
        says = [f"All have spoken:\n\n{told}\n\nWhat is your position now?"] * len(debaters)
    s.join(branches)
    s += ps.user(f"You are the moderator. The last words were:\n\n{told}\n\nDecide in one sentence.")
    return await s.gen(max_tokens=max_tokens, name="decision")


async def _round(s: ps.State, branches: list[ps.State], says: list[str], max_tokens: int) -> list[str]:
    """Ask every branch at the same time."""
    return await s.gather(
        branch.ask(ps.user(text), max_tokens=max_tokens) for branch, text in zip(branches, says, strict=True)
    )
