"""What a program runs against."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from preble_sgl.core import Completion, PlanHint, ProgramId, Request
from preble_sgl.dsl.chat import ChatFormat

T = TypeVar("T")


class Backend(Protocol):
    """Answers the calls of programs; a `Fleet` is one."""

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the model behind this backend."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Answer one request. Raises a PrebleError when it cannot; cancelling aborts the request."""
        ...

    def begin_program(self, hint: PlanHint) -> None:
        """Learn that a program run begins, and what is known of it."""
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
