"""Leaf types that every package shares. Imports nothing from the project.

A *call* of a program becomes a `Request`; the global scheduler answers with a `Placement`; a runtime
streams `Chunk`s; the caller gets a `Completion`; the fleet keeps a `RequestRecord`.

Suffixes: `_s` seconds, `_at` an instant on the caller's clock in seconds, `_len` tokens in one thing.
"""

import uuid
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NewType, TypeAlias

WorkerId = NewType("WorkerId", str)
RequestId = NewType("RequestId", str)
ProgramId = NewType("ProgramId", str)

TokenIds: TypeAlias = "array[int]"
"""Token ids packed as C int32 (`array("i")`): 4 bytes each, sliced and compared with memcpy and memcmp.

Shared freely and therefore never changed after it was handed on.
"""

BlockHashes: TypeAlias = "array[int]"
"""Hashes of KV-cache pages packed as C int64 (`array("q")`). A hash names a page and the prefix before it."""

_TOKEN_BYTES = 4
_FIRST_STRETCH = 32 * _TOKEN_BYTES

FinishReason = Literal["stop", "length", "abort"]

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: `role`, and `content` as a text or, with images, as a list of parts."""

PlacementReason = Literal[
    "only_worker",
    "random",
    "round_robin",
    "least_load",
    "power_of_two",
    "affinity",
    "overflow",
    "least_cost",
    "exploit",
    "explore",
    "balance",
    "rebalance",
    "replicate",
    "steal",
]


def token_ids(ids: Iterable[int] = ()) -> TokenIds:
    """Pack ids into the form that every part of the project exchanges."""
    return array("i", ids)


def block_hashes(hashes: Iterable[int] = ()) -> BlockHashes:
    """Pack the hashes of KV-cache pages. Raises OverflowError beyond 64 bits."""
    return array("q", hashes)


def common_prefix_len(a: bytes, b: bytes, offset: int = 0) -> int:
    """Return how many tokens packed `a` (`TokenIds.tobytes()`) shares with `b` from its byte `offset` on.

    Compares by memcmp: doubling stretches until one differs, then bisects that. O(answer) bytes.
    """
    end = min(len(a), len(b) - offset) // _TOKEN_BYTES * _TOKEN_BYTES
    low, stretch = 0, _FIRST_STRETCH
    while low < end and a[low : low + stretch] == b[offset + low : offset + low + stretch]:
        low += stretch
        stretch *= 2
    low, high = min(low, end) // _TOKEN_BYTES, min(low + stretch, end) // _TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        start, stop = low * _TOKEN_BYTES, middle * _TOKEN_BYTES
        if a[start:stop] == b[offset + start : offset + stop]:
            low = middle
        else:
            high = middle - 1
    return low


def new_request_id() -> RequestId:
    """Return 32 hex digits. SGLang aborts by id *prefix*, so no id may be the prefix of another."""
    return RequestId(uuid.uuid4().hex)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion. `max_new_tokens=0` computes the prompt and nothing else."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    regex: str | None = None
    json_schema: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be 0 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.regex is not None and self.json_schema is not None:
            raise ValueError("give regex or json_schema, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call as the scheduler and the runtimes see it.

    `score_from` asks for the log-probabilities of `prompt[score_from:]` (used by `select`); it is at
    least 1, because the first token of a prompt has none. `num_top_logprobs` asks for the log-probability
    of each generated token and of so many likeliest in its place.
    `messages` say the prompt again for servers that take a chat. With `images` (URLs, files or base64) its
    text is sent, not its tokens: those of the images are stand-ins.
    `expected_output_len`: tokens that the caller expects to be generated, for the scheduler.
    `namespace` separates caches: requests of two namespaces never share a prefix (SGLang's `cache_salt`).
    """

    request_id: RequestId
    program_id: ProgramId
    call_path: str
    prompt: TokenIds
    sampling: SamplingParams = field(default_factory=SamplingParams)
    score_from: int | None = None
    num_top_logprobs: int | None = None
    messages: tuple[Message, ...] = ()
    images: tuple[str, ...] = ()
    text: str | None = None
    expected_output_len: int | None = None
    tenant: str = "default"
    namespace: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"call {self.call_path}: the prompt is empty; add text before generating")
        if self.score_from is not None and not 1 <= self.score_from < len(self.prompt):
            raise ValueError(
                f"score_from={self.score_from}: must lie inside the prompt of {len(self.prompt)} tokens"
            )


def prefill_request(prompt: TokenIds, namespace: str = "") -> Request:
    """Return a request that computes a prompt, so that it is cached, and generates nothing."""
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("warm-up"),
        call_path="warm-up",
        prompt=prompt,
        namespace=namespace,
        sampling=SamplingParams(max_new_tokens=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHint:
    """What a plan says of one program run, for the scheduler. Advice: a wrong one costs time only.

    `kv_tokens`: KV that its calls hold together at their widest, in tokens; None when nobody knows.
    `prefixes`: beginnings of prompts to come, as far as they are known. `deadline_at`: when it should end.
    """

    program_id: ProgramId
    kv_tokens: int | None = None
    prefixes: tuple[TokenIds, ...] = ()
    deadline_at: float | None = None

    def __post_init__(self) -> None:
        if self.kv_tokens is not None and self.kv_tokens < 0:
            raise ValueError(f"plan of {self.program_id}: kv_tokens={self.kv_tokens}, must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What a runtime says that it does, for whomever: requests that run or wait."""

    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """A prefix to compute on a worker ahead of use. `value_s`: prefill seconds that it is to save."""

    worker_id: WorkerId
    prefix: TokenIds
    namespace: str = ""
    value_s: float = 0.0

    def request(self) -> Request:
        """Return what to ask the worker's runtime for."""
        return prefill_request(self.prefix, self.namespace)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes and why. `costs` holds the cost of each candidate, in the policy's unit."""

    request_id: RequestId
    worker_id: WorkerId
    matched_len: int
    reason: PlacementReason
    costs: Mapping[WorkerId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one call as the runtime reports them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the runtime had to prefill."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, its log-probability, and the likeliest tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a streamed answer: what is new since the previous chunk.

    The last chunk, and only it, has a `finish_reason`, the final `usage` and the log-probabilities asked for.
    """

    output_ids: TokenIds
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    logprobs: tuple[float, ...] = ()
    output_logprobs: tuple[TokenLogprob, ...] = ()


OnChunk: TypeAlias = Callable[[Chunk, int], None]
"""Is told of each chunk of an answer, and by which attempt at it: a lost runtime's answer begins anew."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one request. `logprobs[i]` belongs to `prompt[score_from + i]`.

    `is_duplicate`: an equal request was answered, and this is its answer; nothing was computed.
    """

    output_ids: TokenIds
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] = ()
    output_logprobs: tuple[TokenLogprob, ...] = ()
    is_duplicate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request, for reports. Instants are on the fleet's clock, in seconds.

    `placed_at` and `first_token_at` are of the attempt that ended it, the last of `num_attempts`. An
    answer that came as a whole has its first token at its end.
    """

    request_id: RequestId
    program_id: ProgramId
    call_path: str
    placement: Placement
    usage: Usage
    finish_reason: FinishReason
    submitted_at: float
    placed_at: float
    first_token_at: float
    finished_at: float
    num_attempts: int = 1
    tenant: str = "default"

    @property
    def worker_id(self) -> WorkerId:
        """The worker that finished the request."""
        return self.placement.worker_id


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksStored:
    """A runtime has cached consecutive pages: page i is `token_ids[i * block_size : (i + 1) * block_size]`.

    They follow the page `parent_hash`, or begin a prompt of `namespace` if it is None.
    """

    block_hashes: BlockHashes
    parent_hash: int | None
    token_ids: TokenIds
    block_size: int = 1
    namespace: str = ""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.block_hashes) * self.block_size:
            raise ValueError(
                f"{len(self.block_hashes)} blocks of {self.block_size} tokens cannot hold "
                f"{len(self.token_ids)} tokens"
            )


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """A runtime has evicted pages, in any order, but never a page without all that followed it."""

    block_hashes: BlockHashes


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """A runtime has emptied its cache."""


CacheEvent: TypeAlias = BlocksStored | BlocksRemoved | CacheCleared
"""One change of a runtime's KV cache on the GPU, as the runtime tells it."""
