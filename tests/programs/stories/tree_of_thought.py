"""A small tree, and one step that is a little wider."""

from preble_sgl.core import Request
from programs.tree_of_thought import tree_of_thought

PROGRAM = tree_of_thought
ROWS = [
    {"problem": "Measure 4 litres with jugs of 3 and 5.", "breadth": 2, "depth": 2},
    {"problem": "Cross the bridge with one torch.", "breadth": 3, "depth": 1},
]
STATIC = True  # which thought is best changes what is said, not what is called


def answers(request: Request, prompt: str) -> str:
    """Like some thoughts more than others."""
    if request.sampling.json_schema:
        likes = "fill the five" in prompt.rpartition("Proposal 2")[2]
        return f'{{"score": {10 if likes else 3}}}'
    return "fill the five" if "Proposal 2" in prompt else "pour it over"
