"""Four chains and two."""

from preble_sgl.core import Request
from programs.multi_chain import multi_chain

PROGRAM = multi_chain
ROWS = [
    {"question": "Why is the sky blue?"},
    {"question": "Why does ice float?", "chains": 2, "max_tokens": 50},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Say something in each style."""
    if request.call_path.endswith("/answer"):
        return "All ways lead to the same reason."
    return f"Seen from way {request.call_path.split('chain.')[1][0]}, it follows."
