"""SGLang's wire format for `/generate`: a `Request` as a body, its events as `Chunk`s. Does no I/O."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import orjson

from preble_sgl.core import Chunk, FinishReason, Request, SamplingParams, TokenLogprob, Usage, token_ids
from preble_sgl.errors import RequestRejected, RuntimeLost
from preble_sgl.runtime_ext.plugin.hints import Hint, envelope

Settings: TypeAlias = Mapping[str, Any]
"""What a server reports under `/server_info`: its arguments as resolved, and what became of them."""

FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def generate_body(request: Request, *, with_priority: bool, hints: Sequence[Hint] = ()) -> bytes:
    """Return the JSON body that asks for `request` as a stream. `hints` are for our plugin."""
    body: dict[str, Any] = {
        **_prompt(request),
        "rid": request.request_id,
        "sampling_params": _sampling(request.sampling),
        "stream": True,
    }
    if request.num_top_logprobs is not None:  # of generated tokens only: that limits no reuse
        body |= {"return_logprob": True, "top_logprobs_num": request.num_top_logprobs}
    if request.score_from is not None:
        # SGLang reports the token at the start without a value and the following ones with theirs; it
        # reuses no cached prefix beyond the start, so one token before the first wanted is best.
        body |= {"return_logprob": True, "logprob_start_len": request.score_from - 1}
    if request.namespace:
        body["cache_salt"] = request.namespace
    if with_priority:
        body["priority"] = request.priority
    if hints:
        body["kv_hints"] = envelope(request.request_id, hints)
    return orjson.dumps(body)


def _prompt(request: Request) -> dict[str, Any]:
    """Return the token ids; with images the text, as only the runtime knows which tokens they make."""
    if request.images:
        return {"text": request.text, "image_data": list(request.images)}
    return {"input_ids": request.prompt.tolist()}


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Return what differs from "not said"; SGLang rejects null for some fields."""
    named: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "stop": list(params.stop) or None,
        "stop_token_ids": list(params.stop_token_ids) or None,
        "ignore_eos": params.ignore_eos,
        "regex": params.regex,
        "json_schema": params.json_schema,
        "sampling_seed": params.seed,
    }
    return {name: value for name, value in named.items() if value is not None}


BROKEN_OFF = "broken_off"
"""What our server says, as the code of an error, in a stream whose runtime was lost: go on elsewhere."""


class EventSplitter:
    """Cut a stream of bytes into server-sent events and decode their JSON."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the events that `data` completes, without the closing `[DONE]`."""
        *lines, self._rest = (self._rest + data).split(b"\n\n")
        for line in lines:
            payload = line.removeprefix(b"data: ")
            if payload != b"[DONE]":
                yield orjson.loads(payload)


class Answer:
    """Turn the events of one answer into chunks, each with only what is new.

    `incremental`: whether the server already sends only what is new; by default SGLang repeats everything.
    """

    def __init__(self, request: Request, *, incremental: bool) -> None:
        self.finished = False
        self._request = request
        self._incremental = incremental
        self._num_ids = 0
        self._num_chars = 0
        self._logprob_entries: list[Any] = []
        self._top_entries: list[Any] = []

    def chunk(self, event: Mapping[str, Any]) -> Chunk:
        """Return the chunk of one event; raises `RequestRejected` if it is a refusal."""
        if "error" in event:
            error = event["error"]
            if error.get("code") == BROKEN_OFF:
                raise RuntimeLost(error["message"], request_id=self._request.request_id)
            raise self.rejected(error["message"])
        meta = event["meta_info"]
        finish = meta["finish_reason"]
        ids, text = self._new(event["output_ids"], event["text"])
        self._keep_logprobs(meta)
        if finish is None:
            return Chunk(token_ids(ids), text)
        # A request that fails once accepted, for example by its grammar, ends as an abort with a status.
        if finish.get("status_code"):
            raise self.rejected(finish["message"])
        self.finished = True
        reason, scores = FINISH_REASONS[finish["type"]], self._logprobs(meta)
        return Chunk(token_ids(ids), text, reason, _usage(meta), scores, tuple(self._output_logprobs()))

    def rejected(self, message: str, kind: type[RequestRejected] = RequestRejected) -> RequestRejected:
        """Return the error for a refusal, as one line."""
        self.finished = True
        request = self._request
        return kind(
            f"call {request.call_path}: {' '.join(message.split())}",
            program_id=request.program_id,
            request_id=request.request_id,
            call_path=request.call_path,
        )

    def _new(self, ids: list[int], text: str) -> tuple[list[int], str]:
        if self._incremental:
            return ids, text
        new = ids[self._num_ids :], text[self._num_chars :]
        self._num_ids, self._num_chars = len(ids), max(self._num_chars, len(text))
        return new

    def _keep_logprobs(self, meta: Mapping[str, Any]) -> None:
        """Collect what comes of generated tokens: only what is new if the server is incremental, else all."""
        kept = (self._logprob_entries, self._top_entries)
        for entries, name in zip(kept, ("output_token_logprobs", "output_top_logprobs"), strict=True):
            if not self._incremental:
                entries.clear()
            entries.extend(meta.get(name) or ())

    def _output_logprobs(self) -> Iterator[TokenLogprob]:
        if self._request.num_top_logprobs is None:
            return
        tops = self._top_entries or [()] * len(self._logprob_entries)
        for (value, token, *_), top in zip(self._logprob_entries, tops, strict=True):
            yield TokenLogprob(token, value, tuple((other, logprob) for logprob, other, *_ in top or ()))

    def _logprobs(self, meta: Mapping[str, Any]) -> tuple[float, ...]:
        if self._request.score_from is None:
            return ()
        return tuple(value for value, *_ in meta["input_token_logprobs"][1:])


def _usage(meta: Mapping[str, Any]) -> Usage:
    return Usage(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])


def refusal(body: bytes) -> str:
    """Return what a server says when it refuses, in whichever of SGLang's shapes."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")
    if isinstance(answer, dict):
        answer = answer.get("error", answer)
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    return str(answer)
