"""The bodies that clients send, checked, and cut down to what an emulated runtime can do.

Sampling is accepted and changes nothing but the length, for there is no model: every answer is as long as it
may be. What would need a model (grammars, log-probabilities, images) is refused, and so is what is left out
here (several answers to one prompt).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, StrictInt, StrictStr, ValidationError

from preble_sgl.core import TokenIds, new_request_id, token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated.emulation import Wanted
from preble_sgl.runtime_ext.emulated.http_answers import BodyError
from preble_sgl.runtime_ext.emulated.text import Codec, Message

DEFAULT_NEW_TOKENS = 128
"""SGLang's default for `/generate`. A chat without a limit gets it, too: no model is there to stop."""
COMPLETION_TOKENS = 16

Ids = Annotated[list[StrictInt], Strict()]
Texts = Annotated[list[StrictStr], Strict()]
Size = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]

NEEDS_MODEL = (
    *("regex", "json_schema", "ebnf", "structural_tag", "stop_regex", "response_format"),
    *("return_logprob", "logprobs", "top_logprobs", "top_logprobs_num", "token_ids_logprob", "echo"),
    *("image_data", "video_data", "audio_data", "input_embeds", "return_hidden_states", "lora_path"),
    *("session_params", "custom_logit_processor", "suffix"),
)
PLAIN = ({"type": "text"}, "auto", "none")


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class Sampling(_Body):
    """What matters of `sampling_params`."""

    max_new_tokens: Size | None = DEFAULT_NEW_TOKENS
    n: StrictInt = 1


class GenerateBody(_Body):
    """`/generate`: one prompt, or lists of everything."""

    text: StrictStr | Texts | None = None
    input_ids: Ids | list[Ids] | None = None
    rid: StrictStr | Texts | None = None
    sampling_params: Sampling | list[Sampling] | None = None
    stream: StrictBool = False
    cache_salt: StrictStr | None = None
    priority: StrictInt | None = None
    return_prompt_token_ids: StrictBool = False

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        prompts: Sequence[Any] = self.input_ids or self.text or ()
        return isinstance(prompts, list) and not isinstance(prompts[0], int)

    def wanted(self, codec: Codec) -> list[Wanted]:
        """Return the prompts to answer. Raises InputError."""
        prompts = self._prompts(codec)
        many = len(prompts)
        samplings = self._samplings(many)
        for said in (self, *samplings):
            _refuse_what_needs_a_model(said)
        return [
            Wanted(
                request_id=rid,
                prompt=prompt,
                max_new_tokens=_new_tokens(sampling),
                namespace=self.cache_salt or "",
                priority=self.priority or 0,
            )
            for prompt, rid, sampling in zip(prompts, self._rids(many), samplings, strict=True)
        ]

    def _prompts(self, codec: Codec) -> list[TokenIds]:
        if (self.text is None) == (self.input_ids is None):
            raise InputError("give either text or input_ids")
        if self.text is not None:
            texts = self.text if isinstance(self.text, list) else [self.text]
            return [codec.encode(text, is_chat=False) for text in texts]
        return _packed(self.input_ids or [[]])

    def _rids(self, many: int) -> list[str]:
        if self.rid is None:
            return [new_request_id() for _ in range(many)]
        if isinstance(self.rid, str):
            return [f"{self.rid}_{index}" for index in range(many)] if self.is_batch else [self.rid]
        return _one_each("rid", self.rid, many)

    def _samplings(self, many: int) -> list[Sampling]:
        if isinstance(self.sampling_params, list):
            return _one_each("sampling_params", self.sampling_params, many)
        return [self.sampling_params or Sampling()] * many


class StreamOptions(_Body):
    """OpenAI's `stream_options`."""

    include_usage: StrictBool = False


class OpenAIBody(_Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common, with SGLang's additions."""

    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: StrictInt = 1
    rid: StrictStr | None = None
    cache_salt: StrictStr | None = None
    priority: StrictInt | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _wanted(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> list[Wanted]:
        _refuse_what_needs_a_model(self)
        first = self.rid or new_request_id()
        ids = [first if not index else f"{first}_{index}" for index in range(len(prompts))]
        return [
            Wanted(
                request_id=request_id,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                namespace=self.cache_salt or "",
                priority=self.priority or 0,
            )
            for request_id, prompt in zip(ids, prompts, strict=True)
        ]


class CompletionBody(OpenAIBody):
    """`/v1/completions`: one prompt or several, as text or as ids."""

    prompt: StrictStr | Ids | Texts | list[Ids]
    max_tokens: Count | None = None
    best_of: StrictInt | None = None

    def wanted(self, codec: Codec) -> list[Wanted]:
        """Return the prompts to answer. Raises InputError."""
        if (self.best_of or 1) != 1:
            raise _not_here("best_of above 1")
        return self._wanted(self._prompts(codec), self.max_tokens or COMPLETION_TOKENS)

    def _prompts(self, codec: Codec) -> list[TokenIds]:
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if given and isinstance(given[0], str):
            return [codec.encode(text, is_chat=False) for text in given]
        return _packed(given or [[]])


class ChatMessage(_Body):
    """One message; its content may be cut into parts."""

    role: StrictStr
    content: StrictStr | list[dict[str, Any]] | None = None

    def flat(self) -> Message:
        """Return it with the content as one text. Raises InputError for anything but text."""
        parts = [self.content] if isinstance(self.content, str) else map(_part_text, self.content or ())
        return {**self.model_dump(exclude={"content"}), "content": "".join(parts)}


class ChatBody(OpenAIBody):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Size | None = None
    max_completion_tokens: Size | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None

    def wanted(self, codec: Codec) -> list[Wanted]:
        """Return the conversation to go on with. Raises InputError."""
        if self.tool_choice not in (None, "auto", "none"):
            raise _no_model(f"tool_choice={self.tool_choice}")
        text = codec.render([message.flat() for message in self.messages], self.tools or [])
        limit = self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS
        return self._wanted([codec.encode(text, is_chat=True)], limit)


class AbortBody(_Body):
    """`/abort_request`."""

    rid: StrictStr | None = None
    abort_all: StrictBool = False


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], data: bytes) -> B:
    """Read a body. Raises BodyError, with all that is wrong in one line."""
    try:
        return kind.model_validate(orjson.loads(data))
    except orjson.JSONDecodeError as error:
        raise BodyError(f"the body is not JSON ({error})") from None
    except ValidationError as error:
        problems = {".".join(map(str, one["loc"])): one["msg"] for one in error.errors()}
        listed = "; ".join(f"{place}: {problem}" if place else problem for place, problem in problems.items())
        raise BodyError(f"the body cannot be used: {listed}") from None


def _refuse_what_needs_a_model(body: BaseModel) -> None:
    """Raise InputError for a field that is set and cannot be honoured."""
    for name, value in (body.model_extra or {}).items():
        if name in NEEDS_MODEL and value and value not in PLAIN:
            raise _no_model(name)
        if name == "extra_key" and value:
            raise InputError("extra_key is not emulated: separate caches with cache_salt")
    if getattr(body, "n", 1) != 1:
        raise _not_here("n above 1")


def _no_model(what: str) -> InputError:
    return InputError(f"{what}: an emulated runtime has no model and makes up its answers; leave it out")


def _not_here(what: str) -> InputError:
    return InputError(f"{what}: an emulated runtime gives one answer to a prompt; send several requests")


def _part_text(part: Mapping[str, Any]) -> str:
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _no_model(f"message part of type {part.get('type')}")
    return str(part["text"])


def _packed(prompts: Sequence[Any]) -> list[TokenIds]:
    """Return ids, or a list of ids, packed."""
    lists = [prompts] if prompts and isinstance(prompts[0], int) else prompts
    try:
        return [token_ids(ids) for ids in lists]
    except OverflowError:
        raise InputError("a token id is beyond 32 bits") from None


def _new_tokens(sampling: Sampling) -> int:
    given = sampling.max_new_tokens
    return DEFAULT_NEW_TOKENS if given is None else given


T = TypeVar("T")


def _one_each(name: str, values: Sequence[T], many: int) -> list[T]:
    if len(values) != many:
        raise InputError(f"{name}: {len(values)} given for {many} prompts")
    return list(values)
