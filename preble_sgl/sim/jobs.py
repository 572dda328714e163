"""One request inside the engine model, and what is reported of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from preble_sgl.core import CacheEvent, FinishReason, Request, RequestId, TokenIds, Usage
from preble_sgl.sim.kv_cache import TOKEN_BYTES, KvNode
from preble_sgl.sim.wait_queue import SHARED_LEN


@dataclass(slots=True, eq=False)
class Job:
    """A request in the engine: waiting, in prefill, or running.

    `packed`: the tokens whose KV a prefill has to complete: the prompt, and after a retraction what was
    generated. `limit_len`: output tokens that the caller allowed, which admission reckons with; `output` is
    what it generates. `node`: end of its cached prefix, locked unless it waits. `kv_len`: tokens with KV.
    `ends_at_step`: the decode step after which it ends, while it runs. `arrived_at_len`: prompt tokens that
    the engine had computed when it came. `served_len` and `waited_len`: see `Waiting`.
    """

    request: Request
    output: TokenIds
    limit_len: int
    number: int
    submitted_at: float
    node: KvNode
    packed: bytes
    total_len: int
    beginning: object
    arrived_at_len: int = 0
    kv_len: int = 0
    num_output: int = 0
    cached_tokens: int | None = None
    first_token_at: float | None = None
    ends_at_step: int = 0
    num_retractions: int = 0
    is_aborted: bool = False
    served_len: int = 0
    waited_len: int = 0

    @property
    def matched_len(self) -> int:
        """Cached tokens in front of it."""
        return self.node.end_len

    @property
    def expected_len(self) -> float:
        """Output tokens to expect: what its caller does, or all that it may produce."""
        expected = self.request.expected_output_len
        return self.limit_len if expected is None else min(expected, self.limit_len)

    @property
    def missing_len(self) -> int:
        """Tokens that a prefill would compute."""
        return self.total_len - self.node.end_len

    def retract(self) -> None:
        """Go back to waiting; what it has generated stays, but its KV is lost like the prompt's."""
        self.packed = (self.request.prompt + self.output[: self.num_output]).tobytes()
        self.total_len = len(self.request.prompt) + self.num_output
        self.kv_len = 0
        self.num_retractions += 1

    def packed_with_output(self) -> bytes:
        """Return prompt and output as far as it has KV: the last token generated was never run."""
        return (self.request.prompt + self.output[: max(0, self.num_output - 1)]).tobytes()


def beginning_of(request: Request, packed: bytes) -> object:
    """Return what two requests have in common that share their first tokens; None for short prompts."""
    if len(request.prompt) < SHARED_LEN:
        return None
    return request.namespace, packed[: SHARED_LEN * TOKEN_BYTES]


def paged(num_tokens: int, page_size: int) -> int:
    """Return the tokens of the pages that hold so many."""
    return -(-num_tokens // page_size) * page_size


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended. Instants in seconds; `first_token_at` is None if nothing was to be generated."""

    request_id: RequestId
    usage: Usage
    finish_reason: FinishReason
    submitted_at: float
    first_token_at: float | None
    finished_at: float
    num_retractions: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an iteration, or a stretch of decode steps, has done. `first_tokens`: whose prompt is computed."""

    ended_at: float
    first_tokens: Sequence[RequestId]
    finished: Sequence[Finished]
    events: Sequence[CacheEvent] = field(default=())


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a runtime is doing, in the terms of SGLang's `/v1/loads`."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    used_tokens: int
    kv_tokens: int
    prefilled_tokens: int
    prefill_busy_s: float
