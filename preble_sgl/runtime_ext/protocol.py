"""What executes requests, as the fleet sees it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from preble_sgl.core import Chunk, Request, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What a runtime says about itself once it is ready. `kv_tokens`: size of its KV cache in tokens.

    `device`: SGLang's word for what it runs on, such as `cuda` or `cpu`.
    """

    worker_id: WorkerId
    url: str
    model_path: str
    version: str
    device: str
    kv_tokens: int
    page_size: int
    max_input_len: int


class Runtime(Protocol):
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

    async def flush_cache(self) -> None:
        """Forget every cached prefix. Waits until the runtime is idle."""
        ...
