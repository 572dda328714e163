"""Messages of three kinds."""

from preble_sgl.core import Request
from programs.few_shot import few_shot

PROGRAM = few_shot
ROWS = [
    {"text": "The window stays black after a start."},
    {"text": "I would like to sort by date."},
    {"text": "How do I print?"},
    {"text": "The window stays black after a start."},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Tell the kinds apart."""
    last = prompt.rpartition("user")[2]
    return "bug" if "black" in last else "feature" if "like to" in last else "question"
