"""A model's tokenizer and chat template: text and messages to token ids.

Adding a message renders the chat template with and without it and tokenises the difference. That needs a
template whose rendering of a conversation is a prefix of the rendering of any longer one; one that is not
(some drop earlier reasoning) is refused at load, with the two texts that differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import orjson

from preble_sgl.core import Message, TokenIds, token_ids
from preble_sgl.dsl.segments import SegmentEncoder
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template

T = TypeVar("T")

PROBE = "\u2042answer\u2042"
"""Stands for a generated answer when a template is taken apart."""

_BYTES_TEMPLATE = (
    "{% for message in messages %}\x02{{ message.role }}\n{{ message.content }}\x03{% endfor %}"
    "{% if add_generation_prompt %}\x02assistant\n{% endif %}"
)
_MEMORY = 64
_IMAGE_PART = {"type": "image"}


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    ids: list[int]


class Tokenizer(Protocol):
    """What a format needs of a tokenizer; those of the `tokenizers` library have it."""

    def encode(self, sequence: str, /, *, add_special_tokens: bool) -> Any: ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str: ...


@dataclass(slots=True, eq=False)
class Skeleton:
    """A chat to be rendered, a neutral text in place of each generated answer.

    `text` is what the template makes of it, once somebody has asked. Two are equal only if they are the same
    object.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None


EMPTY = Skeleton(text="")


class ChatFormat:
    """A model's tokenizer and chat template. Shared by everything that talks to the model; never changes.

    `directory`: where it was read from, if it was.
    """

    directory: Path | None = None

    def __init__(
        self, tokenizer: Tokenizer, template: "Template | None", specials: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._specials = specials
        self.encode = lru_cache(maxsize=512)(self._encode)
        self.extended = lru_cache(maxsize=_MEMORY)(self._extended)
        self.remember = lru_cache(maxsize=_MEMORY)(self._called)
        self.assistant_end = self._read_template() if template else ""

    @classmethod
    def of_bytes(cls) -> "ChatFormat":
        """Return a format for when no model's is at hand: a token is a byte, a message is plainly marked."""
        return cls(_ByteTokenizer(), _compile_template(_BYTES_TEMPLATE), {})

    @classmethod
    def load(cls, model_path: str | Path) -> "ChatFormat":
        """Read tokenizer and chat template of a Hugging Face model directory.

        Raises InputError when the directory or its `tokenizer.json` is missing or unreadable.
        """
        from tokenizers import Tokenizer

        directory = Path(model_path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{file} does not exist: --model-path takes a Hugging Face model directory")
        try:
            config = _read_json(directory / "tokenizer_config.json")
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise InputError(f"{directory}: the tokenizer cannot be read ({error})") from error
        chat = cls(tokenizer, _load_template(directory, config), _special_tokens(config))
        chat.directory = directory
        return chat

    def _encode(self, text: str) -> TokenIds:
        return token_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_start(self, text: str) -> TokenIds:
        """Tokenise the start of a plain-text prompt, with the model's leading special tokens."""
        return token_ids(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: TokenIds) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def encode_in_parts(self, text: str) -> TokenIds:
        """Tokenise a rendered chat, as `encode`, but each stretch between special tokens only once."""
        return self.segments.encode(text)

    @cached_property
    def segments(self) -> SegmentEncoder:
        """What tokenises rendered chats part by part."""
        return SegmentEncoder(self._tokenizer)

    def render(self, messages: Sequence[Message], *, open_answer: bool = False, **extra: Any) -> str:
        """Render `messages` with the model's template; `open_answer` adds the start of an assistant turn.

        `extra`: what else the template may use, such as `tools`.
        """
        if self._template is None:
            raise InputError("this model has no chat template: write plain text instead of ps.user(...)")
        return self._template.render(
            messages=messages, add_generation_prompt=open_answer, **{**self._specials, **extra}
        )

    def rendered(self, chat: Skeleton) -> str:
        """Return a chat as text."""
        if chat.text is None:
            chat.text = self.render(chat.messages)
        return chat.text

    def answered(self, before: Skeleton) -> Skeleton:
        """Return a chat with a generated answer more."""
        return Skeleton((*before.messages, {"role": "assistant", "content": PROBE}))

    def _extended(self, before: Skeleton, role: str, text: str, num_images: int = 0) -> tuple[Skeleton, str]:
        """Return a chat with one message more, and the text that this adds. Remembers the latest answers.

        Raises InputError when the template cannot show images.
        """
        content = [*[_IMAGE_PART] * num_images, {"type": "text", "text": text}] if num_images else text
        chat = Skeleton((*before.messages, {"role": role, "content": content}))
        added = self.rendered(chat)[len(self.rendered(before)) :]
        if num_images and ("'type'" in added or text not in added):
            raise InputError("this model's chat template takes no images: give text only")
        return chat, added

    def _called(self, fn: Callable[..., T], *args: Any) -> T:
        """Return `fn(self, *args)`, a function of nothing else. Remembers the latest answers."""
        return fn(self, *args)

    def opened(self, before: Skeleton) -> str:
        """Return the text that begins an assistant's turn."""
        if self._opening is not None:
            return self._opening
        return self.render(before.messages, open_answer=True)[len(self.rendered(before)) :]

    @cached_property
    def _opening(self) -> str | None:
        """The text that begins an assistant's turn, if it is the same after all that can come before."""
        chat = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
        shown = {self.render(chat[:n], open_answer=True)[len(self.render(chat[:n])) :] for n in (1, 2, 3)}
        return shown.pop() if len(shown) == 1 else None

    @cached_property
    def tool_role(self) -> str:
        """The role under which results of tools are shown: `tool` if the template knows it, else `user`."""
        chat = [{"role": role, "content": role} for role in ("user", "assistant")]
        try:
            shown = self.render([*chat, {"role": "tool", "content": PROBE}])
        except Exception:
            return "user"
        return "tool" if PROBE in shown and shown.startswith(self.render(chat)) else "user"

    def _read_template(self) -> str:
        """Check that rendering is prefix-stable and return the text that ends an assistant turn."""
        messages: list[Message] = []
        before = ""
        for role, content in (
            ("user", "a"),
            ("assistant", PROBE),
            ("user", "b"),
            ("assistant", "c"),
            ("user", "d"),
        ):
            messages.append({"role": role, "content": content})
            after = self.render(messages)
            if not after.startswith(before):
                raise InputError(
                    "the chat template is not prefix-stable: adding a message changes the text before it, "
                    f"so no prefix can be reused ({before[-40:]!r} became {after[: len(before)][-40:]!r}). "
                    "Give the model a template that only appends"
                )
            before = after
        return self.render(messages[:2]).partition(PROBE)[2]


class _ByteTokenizer:
    """UTF-8 bytes as tokens."""

    def encode(self, sequence: str, /, *, add_special_tokens: bool) -> Encoding:
        return _Ids(list(sequence.encode(errors="replace")))

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        text = bytes(token for token in ids if token < 256).decode(errors="replace")
        return text.replace("\x02", "").replace("\x03", "") if skip_special_tokens else text


@dataclass(slots=True)
class _Ids:
    ids: list[int]


def _read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return loaded


def _load_template(directory: Path, config: Mapping[str, Any]) -> "Template | None":
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    file = directory / "chat_template.jinja"
    if file.is_file():
        source = file.read_text()
    return _compile_template(source) if source else None


def _compile_template(source: str) -> "Template":
    """Compile with the environment that Hugging Face templates are written for."""
    from jinja2 import Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise InputError(f"the chat template refuses this conversation: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=Undefined, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: orjson.dumps(value).decode()
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    specials = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        specials[name] = value["content"] if isinstance(value, dict) else value or ""
    return specials
