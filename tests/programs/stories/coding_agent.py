"""A task that is done in three steps, and one that the model gives up on."""

import orjson

from preble_sgl.core import Request
from programs.coding_agent import coding_agent

REPOSITORY = {"area.py": "def area(r):\n    return 3 * r * r\n", "readme.md.py": "# Areas\n"}
PROGRAM = coding_agent
ROWS = [
    {
        "repository": REPOSITORY,
        "task": "Use math.pi.",
        "checks": {"area.py": "math.pi"},
        "max_steps": 4,
    },
    {"repository": REPOSITORY, "task": "Make it fast.", "checks": {"area.py": "cache"}, "max_steps": 3},
]
STATIC = False


def _call(tool: str, **arguments: str) -> str:
    return orjson.dumps({"calls": [{"tool": tool, "arguments": arguments}]}).decode()


def answers(request: Request, prompt: str) -> str:
    """Read, write, check, end; or end at once."""
    if "Make it fast" in prompt:
        return '{"final": "It is fast enough."}'
    if "all checks pass" in prompt:
        return '{"final": "It uses math.pi now."}'
    if prompt.count("written") > 0:
        return _call("run_checks")
    return _call(
        "write_file", path="area.py", text="import math\n\ndef area(r):\n    return math.pi * r * r\n"
    )
