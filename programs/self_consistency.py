"""Self-consistency: one question, several sampled lines of reasoning, and the answer that most arrive at.

A row: {"question": "...", "samples": 5}. The result: a `Vote`.
All samples have the same prompt, which is computed once; only what they generate differs.
"""

from dataclasses import dataclass

import preble_sgl as ps

RULES = "Think step by step in at most three sentences. End with a line `Answer: NUMBER`."


@dataclass
class Vote:
    """The number that most samples arrived at, and how many of them did."""

    answer: float
    votes: int
    samples: int


@ps.program
async def self_consistency(s: ps.State, question: str, samples: int = 5, max_tokens: int = 96) -> Vote:
    """Sample, read the numbers, count."""
    s += ps.system(RULES) + ps.user(question)
    texts = await s.map(
        range(samples), lambda b, i: b.gen(max_tokens=max_tokens, temperature=0.8), name="sample"
    )
    answer, votes = ps.parse.majority([ps.parse.number(text.rpartition("Answer:")[2]) for text in texts])
    return Vote(answer, votes, samples)
