"""A router: a short call picks the expert, and the expert, with a long prompt of its own, answers.

A row: {"question": "..."}. The result: `{"expert": ..., "answer": ...}`.
Calls of one expert share its instructions over all rows, wherever the router sends them.
"""

import preble_sgl as ps

EXPERTS = {
    "billing": (
        "You answer questions about bills. Bills are sent on the first of a month and due on the fifteenth. "
        "A refund takes five working days. Never promise a refund: say that it will be looked into."
    ),
    "technical": (
        "You answer questions about the device. First ask for the colour of the light. Green: it works, the "
        "network does not. Red: pull the plug, wait ten seconds. No light: the power supply is dead. Give "
        "one step at a time and say what should happen."
    ),
    "other": "You answer politely and briefly, and say which office is in charge.",
}
ROUTER = "You direct questions of customers: billing, technical, or other. Answer with that word only."


@ps.program
async def router_branch(s: ps.State, question: str, max_tokens: int = 96) -> dict[str, str]:
    """Pick an expert, then ask it."""
    s += ps.system(ROUTER) + ps.user(question)
    expert = (await s.select(list(EXPERTS), name="route")).value
    branch = s.sub(name="expert")
    branch += ps.system(EXPERTS[expert]) + ps.user(question)
    answer = await branch.gen(max_tokens=max_tokens, name="answer")
    if expert == "technical":
        answer = await branch.ask(
            ps.user("Say that again in words that everybody knows."), max_tokens=max_tokens, name="plain"
        )
    s.join([branch])
    return {"expert": expert, "answer": answer}
