"""Two topics."""

from preble_sgl.core import Request
from programs.tip_suggestion import tip_suggestion

PROGRAM = tip_suggestion
ROWS = [{"topic": "camping in the rain", "tips": 3}, {"topic": "tuning a piano", "tips": 2}]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Give numbered tips, and a paragraph for each."""
    if request.call_path.endswith("/paragraph"):
        return "Do it early. It saves trouble later."
    return f"Tip {request.call_path[-1]}: go slowly."
