"""kNN prompting: classify by the labelled examples that the model sees in the most similar light.

A row: {"query": "...", "anchors": [["text", "label"], ...], "labels": ["...", ...], "k": 3}. The result: a
`Neighbours`. After Xu et al., "kNN Prompting: Beyond-Context Learning with Calibration-Free Nearest Neighbor
Inference" (arXiv 2303.13824): the model's distribution over the label words is taken for each anchor and for
the query; the k anchors with the least KL divergence KL(anchor || query) vote. Nothing is calibrated, and
anchors need no room in the prompt. The paper takes the whole vocabulary; here it is the label words.
The anchors are the same for all rows: with `output_cache=True` each is asked once for the whole batch.
"""

import math
from collections import Counter
from dataclasses import dataclass

import preble_sgl as ps

RULES = "Say in one word what kind of text this is."


@dataclass
class Neighbours:
    """The label that won, the anchors that voted by place, nearest first, and the query's distribution."""

    label: str
    anchors: list[int]
    distribution: list[float]


def softmax(scores: tuple[float, ...]) -> list[float]:
    """Return log-probabilities as probabilities that add up to 1."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kl_divergence(p: list[float], q: list[float]) -> float:
    """Return KL(p || q) in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@ps.program
async def knn_prompting(
    s: ps.State, query: str, anchors: list[tuple[str, str]], labels: list[str], k: int = 3
) -> Neighbours:
    """Score the labels behind every anchor and behind the query, then let the nearest vote."""
    s += ps.system(RULES)

    async def distribution(branch: ps.State, text: str) -> list[float]:
        branch += ps.user(text)
        return softmax((await branch.select(labels, rule="sum_logprob")).scores)

    *known, asked = await s.map([*(text for text, _ in anchors), query], distribution, name="text")
    nearest = sorted(range(len(anchors)), key=lambda i: kl_divergence(known[i], asked))[:k]
    votes = Counter(anchors[i][1] for i in nearest)
    return Neighbours(votes.most_common(1)[0][0], nearest, asked)
