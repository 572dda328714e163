"""Weather and sport."""

from preble_sgl.core import Request
from programs.knn_prompting import knn_prompting

ANCHORS = [
    ("Rain is expected in the north.", "weather"),
    ("The match ended in a draw.", "sport"),
    ("A cold front brings snow.", "weather"),
    ("She won the sprint.", "sport"),
]
LABELS = ["weather", "sport"]
PROGRAM = knn_prompting
ROWS = [
    {"query": "Fog in the valleys.", "anchors": ANCHORS, "labels": LABELS, "k": 3},
    {"query": "The goalkeeper was ill.", "anchors": ANCHORS, "labels": LABELS, "k": 1},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Lean to one label."""
    sport = any(word in prompt for word in ("match", "sprint", "goalkeeper"))
    return "sport" if sport else "weather"
