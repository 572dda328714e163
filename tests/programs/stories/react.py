"""A question answered at once, one after two steps, and one that never ends."""

import orjson

from preble_sgl.core import Request
from programs.react import react

DOCUMENTS = {"Lake Orta": "The lake is 13 km long.", "Lake Como": "The lake is 46 km long."}
PROGRAM = react
ROWS = [
    {"question": "Is this about lakes?", "documents": DOCUMENTS, "max_steps": 4},
    {"question": "How much longer is Como than Orta?", "documents": DOCUMENTS, "max_steps": 4},
    {"question": "How deep are they?", "documents": DOCUMENTS, "max_steps": 3},
]
STATIC = False


def _call(tool: str, **arguments: str) -> str:
    return orjson.dumps({"calls": [{"tool": tool, "arguments": arguments}]}).decode()


def answers(request: Request, prompt: str) -> str:
    """Look both up, subtract, answer; look for depths for ever."""
    if request.call_path.endswith("/last"):
        return "The documents do not say."
    if "about lakes" in prompt:
        return '{"final": "Yes."}'
    if "How deep" in prompt:
        return _call("look_up", title="depth of Lake Como")
    if "33" in prompt:
        return '{"final": "33 km."}'
    return (
        _call("calculate", expression="46 - 13") if "46 km" in prompt else _call("look_up", title="Lake Como")
    )
