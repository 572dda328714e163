"""Samples that mostly agree."""

from preble_sgl.core import Request
from programs.self_consistency import self_consistency

PROGRAM = self_consistency
ROWS = [
    {"question": "A pen costs 2, a book 5. What do three pens and a book cost?"},
    {"question": "How many legs have four spiders?", "samples": 3},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Be wrong once."""
    wrong = ".1/" in request.call_path
    right = "11" if "pen" in prompt else "32"
    return f"Let me see. Answer: {'7' if wrong else right}"
