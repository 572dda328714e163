"""Map-reduce over a long text: chunks are summarised side by side, then summaries of summaries.

A row: {"text": "...", "chunk_chars": 4000}. The result: one summary.
All chunks of all rows share the instructions; a level of the tree is as wide as it can be.
"""

import preble_sgl as ps

INSTRUCTIONS = (
    "You summarise. Keep names, numbers and decisions, drop everything else, and add nothing that the text "
    "does not say. Answer with the summary only."
)


@ps.program
async def map_reduce(
    s: ps.State, text: str, chunk_chars: int = 4000, fan_in: int = 4, max_tokens: int = 128
) -> str:
    """Summarise chunks, then `fan_in` summaries at a time until one is left."""
    s += ps.system(INSTRUCTIONS)
    parts = [text[start : start + chunk_chars] for start in range(0, len(text), chunk_chars)] or [""]
    summaries = await s.map(
        parts, lambda b, part: b.ask(ps.user(f"Summarise:\n\n{part}"), max_tokens=max_tokens), name="map"
    )
    while len(summaries) > 1:
        groups = [summaries[start : start + fan_in] for start in range(0, len(summaries), fan_in)]
        summaries = await s.map(
            groups,
            lambda b, group: b.ask(
                ps.user("Summarise these parts as one text:\n\n" + "\n\n".join(group)), max_tokens=max_tokens
            ),
            name="reduce",
        )
    return summaries[0]
