"""Few-shot classification: the same demonstrations for every row, then the row's text.

A row: {"text": "..."}. The result: a `Label`.
All rows share the instructions and the demonstrations; only the text is computed anew.
"""

from typing import Literal

import preble_sgl as ps

Label = Literal["bug", "feature", "question"]

INSTRUCTIONS = "You sort messages from users of a program. Answer with one word: bug, feature or question."
DEMOS: list[tuple[str, Label]] = [
    ("It crashes when I open a file that is empty.", "bug"),
    ("Please let me choose the colour of the lines.", "feature"),
    ("Where do I find the settings?", "question"),
    ("Since the update the sum at the bottom is wrong.", "bug"),
    ("A shortcut for saving all files would be great.", "feature"),
]
SHOTS = ps.few_shot(DEMOS, lambda demo: ps.user(demo[0]) + ps.assistant(demo[1]))


@ps.program
async def few_shot(s: ps.State, text: str) -> str:
    """Sort one message."""
    s += ps.system(INSTRUCTIONS) + SHOTS
    return await s.ask(ps.user(text), choices=["bug", "feature", "question"], name="label")
