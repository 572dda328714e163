"""Two and three debaters."""

from preble_sgl.core import Request
from programs.debate import debate

PROGRAM = debate
ROWS = [
    {"question": "Tabs or spaces?", "debaters": ["a purist", "a pragmatist"]},
    {"question": "Is a tomato a fruit?", "debaters": ["a cook", "a botanist", "a lawyer"], "rounds": 3},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Hold a position per debater."""
    if request.call_path.endswith("/decision"):
        return "Both are right in their own field."
    return f"I, number {request.call_path.rpartition('.')[2]}, say it depends on who asks."
