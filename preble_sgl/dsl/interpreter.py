"""Running a program for real: every call goes to the backend."""

from collections.abc import Callable
from typing import Any

from preble_sgl.core import Completion, ProgramId, Request, Usage
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.ops import Selection
from preble_sgl.dsl.schema import parse
from preble_sgl.dsl.state import State

OnCall = Callable[[Usage], None]


class Runner:
    """Answers the calls of one program run from a backend and adds up what they used."""

    def __init__(self, backend: Backend, program_id: ProgramId, on_call: OnCall | None = None) -> None:
        self._backend = backend
        self._on_call = on_call
        self.program_id = program_id
        self.num_calls = 0
        self.usage = Usage()

    async def complete(self, request: Request, state: State) -> Completion:
        """Ask the backend."""
        completion = await self._backend.generate(request)
        self.num_calls += 1
        self.usage += completion.usage
        if self._on_call:
            self._on_call(completion.usage)
        return completion

    def branches_done(self, num_tokens: int) -> None:
        """Tell the backend."""
        self._backend.give_back(self.program_id, num_tokens)

    def value(self, type_: Any, completion: Completion) -> Any:
        """Validate the text. Raises OutputError when it does not fit."""
        return parse(type_, completion.text)

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Take the best score; the earlier choice wins a tie."""
        best = max(range(len(choices)), key=lambda i: scores[i])
        return Selection(choices[best], choices, scores)
