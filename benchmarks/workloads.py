"""Prompts in the shape of Preble's workloads (its Table 1), as token ids, seeded, with nothing to download.

ToolBench: a system prompt of 165 tokens, one of 400 tools of about 1,395 (Zipf 1.1), a question of about
275; 43 tokens out. VideoQA: a video of about 9,770 tokens, asked about 9 times, a question of about 95; 4
tokens out.
"""

import random
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from math import exp, log, sqrt

from preble_sgl.core import TokenIds, token_ids

Prompts = Iterator[tuple[TokenIds, int]]
"""Prompts without end, each with the length of its output."""

VOCABULARY = 100_000


def toolbench(rng: random.Random) -> Prompts:
    """Yield ToolBench-shaped prompts of about 1,835 tokens."""
    system = _tokens(rng, 165)
    tools = [system + _tokens(rng, _lognormal(rng, 1395, 650, 100, 3500)) for _ in range(400)]
    weights = list(accumulate(1 / rank**1.1 for rank in range(1, len(tools) + 1)))
    while True:
        (tool,) = rng.choices(tools, cum_weights=weights)
        yield tool + _tokens(rng, _lognormal(rng, 275, 200, 20, 2000)), _lognormal(rng, 43, 16, 1, 200)


def videoqa(rng: random.Random) -> Prompts:
    """Yield VideoQA-shaped prompts of about 9,865 tokens; 32 videos are under discussion at a time."""
    current = [_tokens(rng, _lognormal(rng, 9770, 5950, 500, 30_000)) for _ in range(32)]
    for number in count():
        slot = number % len(current)
        if rng.random() < 1 / 8.6:
            current[slot] = _tokens(rng, _lognormal(rng, 9770, 5950, 500, 30_000))
        yield current[slot] + _tokens(rng, 95), 4


WORKLOADS: dict[str, Callable[[random.Random], Prompts]] = {"toolbench": toolbench, "videoqa": videoqa}


def _tokens(rng: random.Random, length: int) -> TokenIds:
    """Return random tokens; a 31-bit mask of random bytes is by far the quickest way to make them."""
    ids = token_ids()
    ids.frombytes(rng.randbytes(4 * length))
    return token_ids(token % VOCABULARY for token in ids)


def _lognormal(rng: random.Random, mean: float, deviation: float, low: int, high: int) -> int:
    variance = log(1 + (deviation / mean) ** 2)
    value = exp(rng.gauss(log(mean) - variance / 2, sqrt(variance)))
    return min(high, max(low, round(value)))
