"""A runtime that answers at once: canned bytes on SGLang's routes, as fast as Python can write them.

    python -m benchmarks.gateway.instant_runtime PORT MODEL_PATH

What a router in front of it adds is then nearly all that a client waits for. It reads nothing of a body but
whether a stream is wanted; a stream is `NUM_CHUNKS` events in one write each.
"""

import asyncio
import sys
import time
from typing import Any, cast

import httptools
import orjson
import uvloop

NUM_CHUNKS = 64
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": NUM_CHUNKS,
    "total_tokens": 100 + NUM_CHUNKS,
    "prompt_tokens_details": {"cached_tokens": 0},
}
COMMON = {"id": "0" * 32, "created": 0, "model": "m"}


def _event(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _http(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (kind, len(body), body)


def _part(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _choice(**content: Any) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": None, **content}


WHOLE = _http(
    orjson.dumps(
        {
            **COMMON,
            "object": "chat.completion",
            "choices": [
                _choice(message={"role": "assistant", "content": "word " * 20}, finish_reason="stop")
            ],
            "usage": USAGE,
        }
    )
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = {**COMMON, "object": "chat.completion.chunk", "usage": None}
PIECE = _part(_event({**CHUNK, "choices": [_choice(delta={"content": "word "})]}))
LAST = _part(_event({**CHUNK, "choices": [_choice(delta={}, finish_reason="stop")]}))
USED = _part(_event({**CHUNK, "choices": [], "usage": USAGE}))
END = _part(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Protocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, reports: dict[bytes, Any]) -> None:
        self._reports = reports
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own, which has its methods

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0]
        if path not in (b"/v1/chat/completions", b"/v1/completions", b"/generate"):
            self._transport.write(_http(orjson.dumps(self._reports.get(path, self._report(path)))))
        elif b'"stream":true' in self._body:
            self._stream()
        else:
            self._transport.write(WHOLE)

    def _stream(self) -> None:
        write = self._transport.write
        write(HEAD)
        for _ in range(NUM_CHUNKS - 1):
            write(PIECE)
        write(LAST)
        if b"include_usage" in self._body:
            write(USED)
        write(END)

    def _report(self, path: bytes) -> Any:
        if path != b"/v1/loads":
            return {"status": "ok"}
        load = dict.fromkeys(
            (
                *("num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens", "num_used_tokens"),
                *("total_prefill_uncached_tokens", "total_prefill_busy_us", "token_usage", "dp_rank"),
            ),
            0,
        )
        return {"loads": [load | {"max_total_num_tokens": 10**6, "timestamp": time.time()}]}


def reports(model_path: str) -> dict[bytes, Any]:
    """Return what it says of itself."""
    settings = {
        "model_path": model_path,
        "served_model_name": model_path,
        "tokenizer_path": model_path,
        "version": "0.5.23",
        "device": "cpu",
        "max_total_num_tokens": 10**6,
        "max_req_input_len": 10**6,
        "page_size": 1,
        "is_generation": True,
    }
    models = {"object": "list", "data": [{"id": model_path, "object": "model"}]}
    paths = (b"/server_info", b"/get_server_info", b"/model_info", b"/get_model_info")
    return dict.fromkeys(paths, settings) | {b"/v1/models": models}


async def serve(port: int, model_path: str) -> None:
    """Serve until killed."""
    told = reports(model_path)
    server = await asyncio.get_running_loop().create_server(lambda: Protocol(told), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
