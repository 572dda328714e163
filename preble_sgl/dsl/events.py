"""What happens in a running program, as it happens.

Every event says which run it belongs to (`run`, the id of the program run), which row of a batch (None
outside one), which branch, and, if it is about one, which call.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from preble_sgl.core import FinishReason, ProgramId, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    run: ProgramId
    row: int | None
    branch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStarted(_Event):
    """A call was handed to the backend."""

    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta(_Event):
    """More of an answer. A higher `attempt` than before begins it anew: drop what came of it so far."""

    call: str
    text: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnded(_Event):
    """A call has its answer."""

    call: str
    text: str
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStarted(_Event):
    """A tool was called."""

    tool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEnded(_Event):
    """A tool returned, or failed; `result` is what the model is shown."""

    tool: str
    result: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(_Event):
    """The program returned. The last event of a stream."""

    value: Any
    usage: Usage


Event: TypeAlias = CallStarted | TextDelta | CallEnded | ToolStarted | ToolEnded | RunEnded
