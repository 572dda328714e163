"""A question for each expert."""

from preble_sgl.core import Request
from programs.router_branch import router_branch

PROGRAM = router_branch
ROWS = [
    {"question": "Why is my bill so high?"},
    {"question": "The light on the box is red."},
    {"question": "Where is your office?"},
    {"question": "The light on the box is off."},
]
STATIC = False


def answers(request: Request, prompt: str) -> str:
    """Route by a word; answer as the expert would."""
    if "/route" in request.call_path:
        return "billing" if "bill so" in prompt else "technical" if "The light on" in prompt else "other"
    return "Pull the plug." if request.call_path.endswith("plain") else "We will look into it at once."
