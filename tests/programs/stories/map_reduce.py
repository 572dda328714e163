"""Texts of one, three and seven chunks."""

from preble_sgl.core import Request
from programs.map_reduce import map_reduce

MINUTES = "Item 1: the roof leaks, 400 euros are approved. Item 2: a fair on 3 May. Item 3: Ms Weiss leaves. "
PROGRAM = map_reduce
ROWS = [
    {"text": MINUTES, "chunk_chars": 200},
    {"text": MINUTES * 2, "chunk_chars": 80, "fan_in": 2},
    {"text": MINUTES * 5, "chunk_chars": 80, "max_tokens": 40},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Name what the prompt is about."""
    return f"{'Together' if '/reduce' in request.call_path else 'Part'}: the roof, the fair and Ms Weiss."
