"""A grid where the model knows the way from one corner and not from the other."""

from preble_sgl.core import Request
from programs.guided_exploration import guided_exploration

PROGRAM = guided_exploration
ROWS = [
    {
        "size": 4,
        "walls": [[1, 1], [2, 1]],
        "goal": [3, 3],
        "starts": [[0, 0], [0, 3]],
        "episodes": 6,
        "seed": seed,
    }
    for seed in (0, 1)
]
STATIC = False


def answers(request: Request, prompt: str) -> str:
    """Go round the walls, or into one."""
    return "down down down right right right" if "From (0, 0)" in prompt else "up up up"
