"""Write programs that call a language model in plain Python; run them on a fleet of SGLang runtimes.

import preble_sgl as ps

@ps.program
async def ask(s, document: str, question: str) -> str:
    s += ps.system("Answer from the document.") + ps.user(document)
    return await s.ask(ps.user(question), max_tokens=64)

with ps.Fleet.launch() as fleet:
    print(ask.plan(rows, fleet=fleet).explain())
    batch = ask.map(rows, fleet=fleet)
"""

from typing import TYPE_CHECKING, Any

from preble_sgl.dsl import parse
from preble_sgl.dsl.batch import Batch, RowResult
from preble_sgl.dsl.decisions import is_tracing
from preble_sgl.dsl.events import CallEnded, CallStarted, RunEnded, TextDelta, ToolEnded, ToolStarted
from preble_sgl.dsl.ops import (
    Gen,
    Generation,
    Prompt,
    Select,
    Selection,
    assistant,
    few_shot,
    gen,
    select,
    system,
    user,
)
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.program import Program, program
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.recording import record, replay
from preble_sgl.dsl.reorder import fields
from preble_sgl.dsl.retry import Retry
from preble_sgl.dsl.scripted import LEAST, ScriptedBackend
from preble_sgl.dsl.state import State
from preble_sgl.dsl.tools import Tool, ToolCall, Turn, effect, tool
from preble_sgl.errors import (
    DeadlineError,
    InputError,
    LaunchError,
    NoWorkerError,
    OutputError,
    PrebleError,
    ReplayMiss,
    RequestRejected,
    RuntimeLost,
    ToolError,
)

if TYPE_CHECKING:
    from preble_sgl.fleet import Fleet
    from preble_sgl.openai_backend import OpenAIBackend
    from preble_sgl.runtime_ext.supervisor import Watching

__version__ = "0.1.0"

__all__ = [
    "LEAST",
    "Batch",
    "CallEnded",
    "CallStarted",
    "DeadlineError",
    "Fleet",
    "Gen",
    "Generation",
    "InputError",
    "LaunchError",
    "NoWorkerError",
    "OpenAIBackend",
    "OutputError",
    "Plan",
    "PrebleError",
    "Program",
    "ProgramProfile",
    "Prompt",
    "ReplayMiss",
    "RequestRejected",
    "Retry",
    "RowResult",
    "RunEnded",
    "RuntimeLost",
    "ScriptedBackend",
    "Select",
    "Selection",
    "State",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolEnded",
    "ToolError",
    "ToolStarted",
    "Turn",
    "Watching",
    "assistant",
    "effect",
    "few_shot",
    "fields",
    "gen",
    "is_tracing",
    "parse",
    "program",
    "record",
    "replay",
    "select",
    "system",
    "tool",
    "user",
]


def __getattr__(name: str) -> Any:
    """Load what needs an HTTP client only when it is asked for, so that importing stays quick."""
    if name == "Fleet":
        from preble_sgl.fleet import Fleet

        return Fleet
    if name == "OpenAIBackend":
        from preble_sgl.openai_backend import OpenAIBackend

        return OpenAIBackend
    if name == "Watching":
        from preble_sgl.runtime_ext.supervisor import Watching

        return Watching
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
