"""Two pieces of code, two and three dimensions."""

from preble_sgl.core import Request
from programs.judge import judge

PROGRAM = judge
ROWS = [
    {"article": "def f(x): return x + 1", "dimensions": ["naming", "safety"]},
    {"article": "while True: pass", "dimensions": ["naming", "safety", "speed"], "max_tokens": 30},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Judge."""
    if request.sampling.json_schema:
        return '{"score": 2, "decision": "revise", "reason": "names say nothing"}'
    return "Line 1 decides."
