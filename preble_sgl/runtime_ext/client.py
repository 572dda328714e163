"""Use one stock SGLang server by its URL.

Whatever a server answers, if only to refuse, becomes chunks or `RequestRejected`; `RuntimeLost` means
that there was no answer, or only half of one.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import anyio
import orjson

from preble_sgl.core import (
    Chunk,
    Request,
    RequestId,
    TokenIds,
    Usage,
    WorkerId,
    prefill_request,
    token_ids,
)
from preble_sgl.errors import InputError, RequestRejected, RuntimeFaulty, RuntimeLost
from preble_sgl.runtime_ext.cache_events import event_source
from preble_sgl.runtime_ext.model_files import vocab_size
from preble_sgl.runtime_ext.plugin.hints import CallHint, Hint, Pin, Unpin
from preble_sgl.runtime_ext.plugin.settings import NAME as PLUGIN_NAME
from preble_sgl.runtime_ext.protocol import PluginMarker, RuntimeInfo, RuntimeLoad
from preble_sgl.runtime_ext.wire import Answer, EventSplitter, Settings, generate_body, refusal
from preble_sgl.sim.wait_queue import STOCK_ORDERS, WaitOrder

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 60.0
# Below the 5 s after which SGLang closes an idle connection, so that no POST meets a closed one.
KEEPALIVE_S = 2.0
GATEWAY_FAILURES = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)


S = TypeVar("S", bound="SglangRuntime")


class SglangRuntime:
    """An SGLang server that somebody runs. Open it with `attach`; nothing here stops the server."""

    def __init__(self, session: aiohttp.ClientSession, info: RuntimeInfo, settings: Settings) -> None:
        self._session = session
        self._info = info
        self._with_priority = bool(settings.get("enable_priority_scheduling"))
        self._vocab_size = vocab_size(info.model_path)
        self._plugin = plugin_marker(settings)

    @classmethod
    @asynccontextmanager
    async def attach(
        cls: type[S],
        url: str,
        *,
        worker_id: WorkerId | None = None,
        api_key: str | None = None,
        wire_order: WaitOrder | None = None,
    ) -> AsyncIterator[S]:
        """Connect to the server at `url`. `worker_id` defaults to its host and port.

        `wire_order`: what the priorities of requests are to stand for, see `RuntimeInfo`.

        Raises `RuntimeLost` if nothing answers there and `InputError` if it is not an SGLang server.
        """
        async with open_session(url, api_key) as session:
            settings = await read_settings(session, url)
            yield cls(session, _info(url, worker_id, settings, wire_order, api_key), settings)

    @property
    def info(self) -> RuntimeInfo:
        """What the server said about itself when we attached."""
        return self._info

    @property
    def plugin(self) -> PluginMarker | None:
        """What our plugin in the server said of itself when we attached; None without it."""
        return self._plugin

    async def stream(self, request: Request, hints: Sequence[Hint] = ()) -> AsyncGenerator[Chunk, None]:
        """Run `request` and yield what is new, as it comes; the last chunk has the finish reason.

        The output ids include what ended the output (the end-of-sequence token, the stop token, the tokens
        of the stop string); the text does not. With `score_from`, the last chunk has the log-probabilities
        and at most `score_from - 1` tokens can come from the cache. Closing the iterator early, or
        cancelling its task, aborts the request on the server.

        Raises `RequestRejected` or `RuntimeLost`.
        """
        answer = Answer(request, incremental=self._info.tells_new_only)
        self._require_known_tokens(request, answer)
        body = generate_body(
            request, with_priority=self._with_priority, hints=hints or self.hints_for(request)
        )
        try:
            async with self.forward("POST", "generate", body, headers=self.headers_of(request)) as response:
                await _require_accepted(response, answer)
                events = EventSplitter()
                async for data in response.content.iter_any():
                    for event in events.feed(data):
                        yield answer.chunk(event)
        except (GeneratorExit, asyncio.CancelledError):
            if not answer.finished:
                await self._abort(request.request_id)
            raise
        if not answer.finished:
            raise self._lost("the answer broke off")

    def headers_of(self, request: Request) -> Mapping[str, str]:
        """Return what a request says beside its body: nothing to a runtime."""
        return {}

    async def warm(self, prompt: TokenIds, *, namespace: str = "") -> int:
        """Compute a prompt, so that it is cached; return how many tokens were not."""
        return (await self._compute(prompt, namespace)).computed_tokens

    async def pin(self, pin_id: str, prompt: TokenIds, *, expires_s: float, namespace: str = "") -> int:
        """Compute a prompt and keep its KV for so long at most; return how many tokens are kept.

        0 if the runtime has no plugin that takes pins, or would keep more than it may. A pin of the same id
        is replaced. Raises InputError unless `expires_s` is above 0.
        """
        if not expires_s > 0:
            raise InputError(f"expires_s={expires_s}: must be above 0")
        if self._plugin is None or not self._plugin.takes_pins:
            return 0
        await self._compute(prompt, namespace, [Pin(pin_id, expires_s)])
        return (await self.read_pins()).get(pin_id, 0)

    async def unpin(self, pin_id: str) -> None:
        """Let go of a pin; an unknown one is none."""
        if self._plugin is not None and self._plugin.takes_pins:
            await self._compute(token_ids([0]), "", [Unpin(pin_id)])

    async def _compute(self, prompt: TokenIds, namespace: str, hints: Sequence[Hint] = ()) -> Usage:
        usage = Usage()
        async for chunk in self.stream(prefill_request(prompt, namespace), hints):
            usage = chunk.usage
        return usage

    async def read_pins(self) -> Mapping[str, int]:
        """Return the tokens that each pin keeps, as the plugin says now; none without it."""
        marker = await self.read_marker()
        return marker.pins if marker else {}

    async def read_marker(self) -> PluginMarker | None:
        """Return what our plugin in the server says of itself now; None without it."""
        return plugin_marker(await read_settings(self._session, self._info.url))

    def hints_for(self, request: Request) -> Sequence[Hint]:
        """Return what the plugin's wait queue goes by."""
        if self._plugin is None or self._plugin.order in STOCK_ORDERS:
            return ()
        return (CallHint(request.program_id, request.expected_output_len),)

    async def ready(self) -> bool:
        """Return whether the server takes requests: it has started and is neither paused nor stopping."""
        return await is_ready(self._session)

    async def loads(self) -> RuntimeLoad:
        """Return what the server is doing. It reads shared memory and disturbs nothing."""
        answer = orjson.loads(await self._control("GET", "v1/loads"))
        return _sum_of_ranks(answer["loads"])

    async def silent_s(self) -> float:
        """Return for how many seconds the server's scheduler has published no load, by the server's clock.

        0 for a server that does not tell.
        """
        try:
            answer = orjson.loads(await self._control("GET", "v1/loads"))
            asked_at = datetime.fromisoformat(answer["timestamp"]).timestamp()
            told_at: float = min(rank["timestamp"] for rank in answer["loads"])
        except (RequestRejected, ValueError, LookupError, TypeError):
            return 0.0
        return asked_at - told_at

    async def flush_cache(self) -> None:
        """Forget every cached prefix. Waits until the server is idle; `RequestRejected` after 60 s."""
        path = f"flush_cache?timeout={FLUSH_TIMEOUT_S:.0f}"
        await self._control("POST", path, timeout_s=FLUSH_TIMEOUT_S + CONTROL_TIMEOUT_S)

    async def _control(self, method: str, path: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> bytes:
        async with self.forward(method, path, timeout_s=timeout_s) as response:
            body = await response.read()
            if response.status != HTTPStatus.OK:
                raise RequestRejected(f"{self._name}: {refusal(body)}", worker_id=self._info.worker_id)
            return body

    async def _abort(self, request_id: RequestId) -> None:
        """Ask the server to stop, as far as it can be reached; it also finds out by itself, only later."""
        body = orjson.dumps({"rid": request_id})
        with anyio.move_on_after(CONNECT_TIMEOUT_S, shield=True), contextlib.suppress(RuntimeLost):
            async with self.forward("POST", "abort_request", body):
                pass

    def forward(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Make one HTTP call, and end it with the context, which ends what the server does for it.

        Every failure of the connection becomes `RuntimeLost`; any other answer is the caller's to read.
        """
        return forwarded(self._session, self._lost, method, path, body, timeout_s=timeout_s, headers=headers)

    def _require_known_tokens(self, request: Request, answer: Answer) -> None:
        """Refuse a token outside the vocabulary, which SGLang does not: its whole server dies of one."""
        if (
            self._vocab_size is not None
            and not request.images  # sent as text; their tokens here are stand-ins
            and not 0 <= min(request.prompt) <= max(request.prompt) < self._vocab_size
        ):
            raise answer.rejected(f"the prompt holds a token outside the vocabulary of {self._vocab_size}")

    @property
    def _name(self) -> str:
        return f"runtime {self._info.worker_id} at {self._info.url}"

    def _lost(self, what: str) -> RuntimeLost:
        return RuntimeLost(f"{self._name}: {what}", worker_id=self._info.worker_id)


@asynccontextmanager
async def forwarded(
    session: aiohttp.ClientSession,
    lost: Callable[[str], RuntimeLost],
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    timeout_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Make one HTTP call of a session; leaving the context ends it. Raises what `lost` makes of a failure."""
    if session.closed:
        raise lost("we have let go of it")
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    sent = {"Content-Type": "application/json", **(headers or {})}
    try:
        async with session.request(method, path, data=body, headers=sent, timeout=timeout) as response:
            if response.status in GATEWAY_FAILURES:
                raise lost(f"HTTP {response.status}")
            yield response
    except (aiohttp.ClientError, OSError) as error:
        raise lost(str(error) or type(error).__name__) from error


@asynccontextmanager
async def open_session(url: str, api_key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """Open connections to one server: as many at once as there are calls, and no limit on their duration."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(f"{url!r} is not the URL of a runtime; it should look like http://127.0.0.1:30000")
    async with aiohttp.ClientSession(
        url.rstrip("/") + "/",
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        timeout=aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
    ) as session:
        yield session


async def is_ready(session: aiohttp.ClientSession) -> bool:
    """Return whether the server answers and takes requests; costs it next to nothing."""
    try:
        async with session.get("ready") as response:
            return response.status == HTTPStatus.OK
    except (aiohttp.ClientError, OSError):
        return False


async def read_settings(session: aiohttp.ClientSession, url: str) -> Settings:
    """Return what the server reports about itself, as `/server_info` has it."""
    try:
        async with session.get("server_info") as response:
            settings: Any = orjson.loads(await response.read())
    except (aiohttp.ClientError, OSError) as error:
        raise RuntimeLost(f"no runtime answers at {url}: {error or type(error).__name__}") from error
    except orjson.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict) or "max_total_num_tokens" not in settings:
        raise InputError(
            f"{url} answers, but is not an SGLang server (HTTP {response.status} to /server_info)"
        )
    return settings


def plugin_marker(settings: Settings) -> PluginMarker | None:
    """Return what our plugin put into `/server_info`; None without it."""
    states = settings.get("internal_states") or [{}]
    told = states[0].get(PLUGIN_NAME)
    return None if told is None else PluginMarker(**{**told, "features": frozenset(told["features"])})


def _info(
    url: str,
    worker_id: WorkerId | None,
    settings: Settings,
    wire_order: WaitOrder | None,
    api_key: str | None,
) -> RuntimeInfo:
    plugin = plugin_marker(settings)
    return RuntimeInfo(
        worker_id=worker_id or default_worker_id(url),
        url=url.rstrip("/"),
        model_path=settings["model_path"],
        version=settings["version"],
        device=settings["device"],
        kv_tokens=settings["max_total_num_tokens"],
        page_size=settings["page_size"],
        max_input_len=settings["max_req_input_len"],
        events=event_source(settings, url),
        wire_order=wire_order,
        api_key=api_key,
        tells_new_only=bool(settings.get("incremental_streaming_output")),
        shared_prefix=plugin is not None and plugin.shared_prefix,
    )


def default_worker_id(url: str) -> WorkerId:
    """Return the name of a server that was given none: its host and port."""
    return WorkerId(urlsplit(url).netloc)


async def _require_accepted(response: aiohttp.ClientResponse, answer: Answer) -> None:
    if response.status != HTTPStatus.OK:
        kind = RuntimeFaulty if response.status == HTTPStatus.INTERNAL_SERVER_ERROR else RequestRejected
        raise answer.rejected(refusal(await response.read()), kind)


def _sum_of_ranks(ranks: list[dict[str, Any]]) -> RuntimeLoad:
    """Add up the data-parallel ranks of one server; nearly always there is one."""

    def total(name: str) -> int:
        return sum(rank[name] for rank in ranks)

    return RuntimeLoad(
        num_running=total("num_running_reqs"),
        num_waiting=total("num_waiting_reqs"),
        waiting_tokens=total("num_waiting_uncached_tokens"),
        used_tokens=total("num_used_tokens"),
        kv_tokens=total("max_total_num_tokens"),
        prefilled_tokens=total("total_prefill_uncached_tokens"),
        prefill_busy_s=total("total_prefill_busy_us") / 1e6,
    )
