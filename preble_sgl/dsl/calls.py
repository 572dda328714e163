"""What gives calls their answers, as a state sees it: an interpreter, told where each call is made."""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from preble_sgl.core import Completion, ProgramId, Request
from preble_sgl.dsl.conversation import Conversation, Encode
from preble_sgl.dsl.ops import Gen, Selection
from preble_sgl.dsl.tools import Tool, ToolCall, Turn

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """Where a call is made: the user's line, and the calls that must end before it (numbers in the run)."""

    line: str
    after: tuple[int, ...]
    depth: int


class Interpreter(Protocol):
    """What gives calls their answers."""

    @property
    def program_id(self) -> ProgramId:
        """Identity of this program run."""
        ...

    @property
    def encode(self) -> Encode:
        """Tokenise text."""
        ...

    async def answer(
        self, request: Request, site: CallSite, op: Gen[Any] | None, conversation: Conversation
    ) -> tuple[int, Completion, Any]:
        """Answer one request: its number in the run, the completion, its value by `op` (None for scores)."""
        ...

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Pick among scored choices."""
        ...

    async def gather(self, awaitables: Sequence[Awaitable[T]]) -> list[T]:
        """Await all, side by side if that makes sense; the first error cancels the rest and is raised."""
        ...

    def branches_done(self, num_tokens: int) -> None:
        """Learn that `num_tokens` tokens of branches that have ended are not used again."""
        ...

    def pause(self, expected_s: float) -> None:
        """Learn that the run makes no call for about `expected_s` seconds."""
        ...

    def turn(self, value: Any, tools: Sequence[Tool[..., Any]], final: Any) -> Turn[Any]:
        """Return what a model decided to do, from what it generated; `final` is the type of an answer."""
        ...

    async def use(self, calls: Sequence[ToolCall], max_parallel: int, path: str) -> list[str]:
        """Call tools and return each result as text."""
        ...
