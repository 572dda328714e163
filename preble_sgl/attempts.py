"""One try at a call on a runtime: what it is given, what is done there, and how it ends."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from preble_sgl.answering import Answering
from preble_sgl.core import FinishReason, Placement, ProgramId, Request, TokenIds, Usage
from preble_sgl.runtime_ext.plugin.hints import envelope
from preble_sgl.runtime_ext.protocol import Runtime


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a call. `priority` makes a stock runtime keep our order, as far as it can.

    An answer that comes as a whole does not show its first token. It is expected in `first_token_in_s`; to
    assume it then lets calls go on that wait for the prefix of this one.
    """

    runtime: Runtime
    placement: Placement
    request: Request
    priority: int | None
    first_token_in_s: float
    on_first_token: Callable[[], None]
    assume_first_token: Callable[[], None]

    @property
    def program_id(self) -> ProgramId:
        """Whose call it is."""
        return self.request.program_id

    @property
    def kv_hints(self) -> dict[str, Any] | None:
        """What to tell our plugin there."""
        hints = self.runtime.hints_for(self.request)
        return envelope(self.request.request_id, hints) if hints else None

    @property
    def tells_new_only(self) -> bool:
        """Whether an event of the runtime's streams has what is new, not all so far."""
        return self.runtime.info.tells_new_only


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. `output_ids` are empty where only their number, which is in `usage`, is known."""

    output_ids: TokenIds
    usage: Usage
    finish_reason: FinishReason


class Work(Protocol):
    """What a call does on a runtime, once or, if that is lost, again elsewhere."""

    @property
    def num_tokens(self) -> int:
        """How many tokens there are of its answer."""
        ...

    async def run(self, attempt: Attempt) -> Outcome:
        """Do it, and tell of the first token. Raises RuntimeLost to be tried again elsewhere."""
        ...


@dataclass(slots=True)
class Generation:
    """A request of a program, whose answer we read."""

    answering: Answering

    @property
    def num_tokens(self) -> int:
        return self.answering.num_tokens

    async def run(self, attempt: Attempt) -> Outcome:
        request = self.answering.next_request()
        if attempt.priority is not None:
            request = replace(request, priority=attempt.priority)
        async for chunk in attempt.runtime.stream(request):
            self.answering.take(chunk)
            attempt.on_first_token()
        completion = self.answering.completion()
        return Outcome(completion.output_ids, completion.usage, completion.finish_reason)
