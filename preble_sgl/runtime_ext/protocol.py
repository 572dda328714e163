"""What executes requests, as the fleet sees it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from preble_sgl.core import Chunk, Request, WorkerId
from preble_sgl.runtime_ext.cache_events import EventSource
from preble_sgl.runtime_ext.plugin.hints import Hint
from preble_sgl.sim.wait_queue import WaitOrder

if TYPE_CHECKING:
    from aiohttp import ClientResponse

Upstream: TypeAlias = "ClientResponse"
"""What a runtime answers to a call that is passed on as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What a runtime says about itself once it is ready. `kv_tokens`: size of its KV cache in tokens.

    `device`: SGLang's word for what it runs on, such as `cuda` or `cpu`. `events`: where it tells of its
    cache. `wire_order`: the order of its wait queue that requests' priorities have to stand for. `api_key`:
    what it has to be sent. `tells_new_only`: an event of its streams has what is new, not all so far.
    `shared_prefix`: its decode steps read what requests share once.
    """

    worker_id: WorkerId
    url: str
    model_path: str
    version: str
    device: str
    kv_tokens: int
    page_size: int
    max_input_len: int
    events: EventSource | None = None
    wire_order: WaitOrder | None = None
    api_key: str | None = field(default=None, repr=False)
    tells_new_only: bool = False
    shared_prefix: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginMarker:
    """What our plugin inside a runtime says of itself. `features` that work, `errors` of those that failed.

    `pins`: tokens by pin. `attention`: steps by what was done in them, and tokens of KV per layer not read.
    """

    version: str
    order: str
    features: frozenset[str]
    errors: Mapping[str, str]
    takes_pins: bool
    pins: Mapping[str, int]
    shared_prefix: bool = False
    attention: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeLoad:
    """What a runtime is doing, as it last published it: at each prefill, every 15 decode steps, when idle.

    `waiting_tokens`: prompt tokens of waiting requests that are not cached. `prefilled_tokens` and
    `prefill_busy_s` are sums since the start; the growth of one by the other is the measured prefill rate.
    """

    num_running: int
    num_waiting: int
    waiting_tokens: int
    used_tokens: int
    kv_tokens: int
    prefilled_tokens: int
    prefill_busy_s: float


class Forwards(Protocol):
    """What calls can be passed on to."""

    def forward(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Upstream]:
        """Pass one HTTP call on as it is; leaving the context ends it there. Raises `RuntimeLost`."""
        ...


class Runtime(Forwards, Protocol):
    """One SGLang server or something that behaves like one."""

    @property
    def info(self) -> RuntimeInfo:
        """What the runtime said about itself when it became ready."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Run `request` and yield what is new, as it comes; the last chunk has the finish reason.

        Closing the iterator early aborts the request on the runtime.
        Raises `RequestRejected` (the runtime refused this request) or `RuntimeLost` (it is gone, or
        broke off in the middle).
        """
        ...

    def hints_for(self, request: Request) -> Sequence[Hint]:
        """Return what our plugin's wait queue goes by, if there is one there."""
        ...

    async def flush_cache(self) -> None:
        """Forget every cached prefix. Waits until the runtime is idle."""
        ...
