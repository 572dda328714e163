"""Nested programs: short tips on a topic, then another program makes a paragraph of each.

A row: {"topic": "...", "tips": 5}. The result: a list of paragraphs.
The inner program has a few-shot prefix of its own, which all tips of all rows share.
"""

import preble_sgl as ps

RULES = "You give practical tips. One short sentence each, no numbering."
EXPAND = "You make a paragraph of two sentences from a tip: what to do, and why it helps."
SHOTS = ps.few_shot(
    [
        (
            "Drink water before coffee.",
            "Begin the day with a glass of water. You wake up thirsty.",
        ),
        ("Sort the screws by length.", "Lay the screws out by length first. The wrong one splits the wood."),
    ],
    lambda shot: ps.user(shot[0]) + ps.assistant(shot[1]),
)


async def expand(s: ps.State, tip: str, max_tokens: int) -> str:
    """Make a paragraph of one tip, in a chat of its own."""
    s += ps.system(EXPAND) + SHOTS
    return await s.ask(ps.user(tip), max_tokens=max_tokens, name="paragraph")


@ps.program
async def tip_suggestion(s: ps.State, topic: str, tips: int = 5, max_tokens: int = 64) -> list[str]:
    """Collect tips one after the other, then expand all side by side."""
    s += ps.system(RULES)
    found = []
    for i in range(tips):
        ask = f"A tip for {topic}, please." if i == 0 else "Another one, please."
        found.append(await s.ask(ps.user(ask), max_tokens=24, name=f"tip{i}"))
    branches = [s.sub(name=f"expand{i}") for i in range(tips)]
    paragraphs = await s.gather(
        expand(branch, tip, max_tokens) for branch, tip in zip(branches, found, strict=True)
    )
    s.join(branches)
    return paragraphs
