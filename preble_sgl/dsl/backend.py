"""What a program runs against."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from preble_sgl.core import Completion, OnChunk, PlanHint, ProgramId, Request
from preble_sgl.dsl.chat import ChatFormat

T = TypeVar("T")


class Backend(Protocol):
    """Answers the calls of programs; a `Fleet` is one."""

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the model behind this backend."""
        ...

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer one request; `on_chunk` sees the answer as it comes.

        Raises a PrebleError when it cannot; cancelling aborts the request.
        """
        ...

    def begin_program(self, hint: PlanHint) -> None:
        """Learn that a program run begins, and what is known of it."""
        ...

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Learn that a program run makes no call for about `expected_s` seconds: a tool is at work."""
        ...

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Learn that a program run will not use so many tokens of its KV again."""
        ...

    def end_program(self, program_id: ProgramId) -> None:
        """Learn that a program run that began makes no more calls."""
        ...

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on the event loop that owns this backend, from a thread that does not, and wait."""
        ...
