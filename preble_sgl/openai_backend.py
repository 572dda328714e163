"""Programs against any OpenAI-compatible server.

Such a server knows nothing of programs, so hints are dropped; it still caches prefixes if it can, and the
order of calls is the same as with a fleet. Two ways to ask: `chat` sends messages, which every server takes,
and `completions` sends token ids, which vLLM and SGLang take, and which keeps every prompt an exact
continuation of the one before. Token ids of answers do not come back: answers are tokenised again.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preble_sgl.core import (
    Chunk,
    Completion,
    FinishReason,
    OnChunk,
    PlanHint,
    ProgramId,
    Request,
    TokenLogprob,
    Usage,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import InputError, RequestRejected, RuntimeLost
from preble_sgl.opening import OnLoop, Opening

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Mode = Literal["chat", "completions"]

NEEDED = "pip install openai"
NO_SCORES = "this server cannot score choices: use gen(choices=...), or a fleet of SGLang runtimes"


class OpenAIBackend(OnLoop):
    """A server that speaks OpenAI's API; open it with `connect`. It is a `dsl.backend.Backend`."""

    def __init__(self, client: "AsyncOpenAI", model: str, chat: ChatFormat, mode: Mode) -> None:
        self._client = client
        self._model = model
        self._chat = chat
        self._mode = mode

    @classmethod
    def connect(
        cls,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str = "none",
        model_path: str | Path | None = None,
        mode: Mode | None = None,
    ) -> "Opening[OpenAIBackend]":
        """Use the server at `base_url` (with its `/v1`) for as long as the context lasts.

        `model`: by default the only one that the server has. `model_path`: a directory with the model's
        tokenizer and chat template; without it plans and counts are in bytes. `mode`: `completions` if there
        is a `model_path`, else `chat`. Failed calls are not made again unless a program says so.

        Raises InputError (no client library, several models, completions without a tokenizer) or RuntimeLost
        (nobody answers).
        """
        if mode == "completions" and model_path is None:
            raise InputError('mode="completions" sends tokens: give model_path, where the tokenizer is')
        chat = ChatFormat.load(model_path) if model_path else ChatFormat.of_bytes()
        chosen: Mode = mode or ("completions" if model_path else "chat")

        @asynccontextmanager
        async def opened() -> AsyncIterator[OpenAIBackend]:
            async with _client(base_url, api_key) as client:
                yield cls(client, model or await _only_model(client, base_url), chat, chosen)

        return Opening(opened)

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the model, or bytes in their place."""
        return self._chat

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer one request as a stream. Cancelling closes it, which stops the server.

        Raises RequestRejected (also for scores of choices, which the API does not have) or RuntimeLost.
        """
        import openai

        if request.score_from is not None:
            raise _rejected(request, NO_SCORES)
        answer = _Answer(self._chat, request, on_chunk)
        try:
            await self._ask(request, answer)
        except openai.APIStatusError as error:
            raise _rejected(request, f"HTTP {error.status_code}: {_told(error)}") from error
        except openai.APIError as error:
            raise RuntimeLost(f"{self._client.base_url}: {error.message}") from error
        return answer.completion()

    async def _ask(self, request: Request, answer: "_Answer") -> None:
        asked = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        asked |= _sampling(request)
        if request.messages and self._mode == "chat":
            messages = [
                _as_user(message) if message["role"] == "tool" else message for message in request.messages
            ]
            stream: Any = await self._client.chat.completions.create(
                messages=messages,  # type: ignore[arg-type]
                **_of_chat(asked, request),
            )
            async with stream:
                async for chunk in stream:
                    answer.add_chat(chunk)
            return
        prompt = request.prompt.tolist() if self._mode == "completions" else self._chat.decode(request.prompt)
        stream = await self._client.completions.create(prompt=prompt, **_of_completions(asked, request))
        async with stream:
            async for chunk in stream:
                answer.add_text(chunk)

    def begin_program(self, hint: PlanHint) -> None:
        """Do nothing: the server has no use for it."""

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Do nothing: the server has no use for it."""

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Do nothing: the server has no use for it."""

    def end_program(self, program_id: ProgramId) -> None:
        """Do nothing: the server has no use for it."""


class _Answer:
    """What has come of one answer so far."""

    def __init__(self, chat: ChatFormat, request: Request, on_chunk: OnChunk | None) -> None:
        self._chat = chat
        self._request = request
        self._on_chunk = on_chunk
        self._text = ""
        self._finish: FinishReason | None = None
        self._usage = Usage()
        self._logprobs: list[TokenLogprob] = []

    def add_chat(self, chunk: Any) -> None:
        """Take a chunk of a chat completion."""
        self._count(chunk.usage)
        for choice in chunk.choices:
            self._add(choice.delta.content or "", choice.finish_reason)
            for entry in (choice.logprobs and choice.logprobs.content) or ():
                tops = ((self._token(top.token), top.logprob) for top in entry.top_logprobs)
                self._logprobs.append(TokenLogprob(self._token(entry.token), entry.logprob, tuple(tops)))

    def add_text(self, chunk: Any) -> None:
        """Take a chunk of a plain completion."""
        self._count(chunk.usage)
        for choice in chunk.choices:
            self._add(choice.text or "", choice.finish_reason)
            found = choice.logprobs
            for place, token in enumerate((found and found.tokens) or ()):
                tops = (found.top_logprobs or [{}] * len(found.tokens))[place] or {}
                pairs = tuple((self._token(text), value) for text, value in tops.items())
                self._logprobs.append(TokenLogprob(self._token(token), found.token_logprobs[place], pairs))

    def _add(self, text: str, finish: str | None) -> None:
        self._text += text
        if finish is not None:
            self._finish = "length" if finish == "length" else "abort" if finish == "abort" else "stop"
        if text and self._on_chunk:
            self._on_chunk(Chunk(token_ids(), text), 0)

    def _count(self, usage: Any) -> None:
        if usage is not None:
            details = usage.prompt_tokens_details
            cached = (details.cached_tokens if details else 0) or 0
            self._usage = Usage(usage.prompt_tokens, cached, usage.completion_tokens)

    def _token(self, text: str) -> int:
        ids = self._chat.encode(text)
        return ids[0] if ids else 0

    def completion(self) -> Completion:
        """Return the whole answer. Raises RuntimeLost if its end is missing."""
        if self._finish is None:
            raise RuntimeLost(f"call {self._request.call_path}: the answer broke off")
        ids = self._chat.encode(self._text)
        if self._finish == "stop":
            ids = ids + self._chat.encode(self._chat.assistant_end)[:1]
        if self._on_chunk:
            self._on_chunk(Chunk(ids, "", self._finish, self._usage), 0)
        logprobs = tuple(self._logprobs) if self._request.num_top_logprobs is not None else ()
        return Completion(ids, self._text, self._finish, self._usage, (), logprobs)


def _sampling(request: Request) -> dict[str, Any]:
    """Return what differs from the API's defaults; what only some servers know goes into `extra_body`."""
    params = request.sampling
    named = {
        "temperature": params.temperature,
        "top_p": params.top_p if params.top_p != 1 else None,
        "frequency_penalty": params.frequency_penalty or None,
        "presence_penalty": params.presence_penalty or None,
        "stop": list(params.stop) or None,
        "seed": params.seed,
    }
    extra = {
        "top_k": params.top_k,
        "min_p": params.min_p or None,
        "regex": params.regex,
        "ignore_eos": params.ignore_eos or None,
        "stop_token_ids": list(params.stop_token_ids) or None,
    }
    return _given(named) | {"extra_body": _given(extra)}


def _of_chat(asked: dict[str, Any], request: Request) -> dict[str, Any]:
    """Add what chat completions have of their own."""
    asked["max_tokens"] = request.sampling.max_new_tokens
    if request.sampling.json_schema is not None:
        import orjson

        schema = {"name": "answer", "strict": True, "schema": orjson.loads(request.sampling.json_schema)}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.num_top_logprobs is not None:
        asked |= {"logprobs": True, "top_logprobs": request.num_top_logprobs}
    return asked


def _of_completions(asked: dict[str, Any], request: Request) -> dict[str, Any]:
    """Add what plain completions have of their own; a schema is an extension that SGLang knows."""
    asked["max_tokens"] = request.sampling.max_new_tokens
    if request.sampling.json_schema is not None:
        asked["extra_body"] = asked["extra_body"] | {"json_schema": request.sampling.json_schema}
    if request.num_top_logprobs is not None:
        asked["logprobs"] = request.num_top_logprobs
    return asked


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _told(error: Any) -> str:
    """Return what the server said, if it said it as the API does."""
    body = error.body.get("error", error.body) if isinstance(error.body, dict) else None
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error.message)


def _as_user(message: Any) -> dict[str, Any]:
    """A tool's message would need the id of a call that the API did not make."""
    return {**message, "role": "user"}


def _rejected(request: Request, message: str) -> RequestRejected:
    return RequestRejected(
        f"call {request.call_path}: {' '.join(message.split())}",
        program_id=request.program_id,
        request_id=request.request_id,
        call_path=request.call_path,
    )


@asynccontextmanager
async def _client(base_url: str, api_key: str) -> AsyncIterator["AsyncOpenAI"]:
    try:
        import openai
    except ImportError:
        raise InputError(f"the client library is missing: {NEEDED}") from None
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=None) as client:
        yield client


async def _only_model(client: "AsyncOpenAI", base_url: str) -> str:
    """Return the name of the server's model. Raises InputError if it has several."""
    import openai

    try:
        models = [model.id async for model in client.models.list()]
    except openai.APIError as error:
        raise RuntimeLost(f"no server answers at {base_url}: {error.message}") from error
    if len(models) != 1:
        raise InputError(f"{base_url} has {len(models)} models: give model, one of {', '.join(models)}")
    return models[0]
