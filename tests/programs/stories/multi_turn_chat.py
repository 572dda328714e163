"""A chat of three turns and one of one."""

from preble_sgl.core import Request
from programs.multi_turn_chat import multi_turn_chat

PROGRAM = multi_turn_chat
ROWS = [
    {"turns": ["Hello.", "What is a prime?", "Is 91 one?"]},
    {"turns": ["Hello."], "max_tokens": 20},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Answer by the last turn."""
    return "No: 7 times 13." if "91" in prompt else "Two divisors." if "prime" in prompt else "Hello!"
