"""Text to token ids: a model's tokenizer and chat template, and a conversation built from exact ids.

A conversation only ever grows. Adding a message renders the chat template with and without it and
tokenises the difference; a generation appends the ids that the runtime really produced. So the ids sent
with one call are a prefix of the ids sent with the next, and a runtime finds all of them in its cache.
That needs a template whose rendering of a conversation is a prefix of the rendering of any longer one;
one that is not (some drop earlier reasoning) is refused at load, with the two texts that differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.dsl.ops import Prompt, Role
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

Message = Mapping[str, str]
Encode = Callable[[str], TokenIds]

_PROBE = "\u2042answer\u2042"  # stands for a generated answer when the template is taken apart


class ChatFormat:
    """A model's tokenizer and chat template. Shared by everything that talks to the model; never changes."""

    def __init__(
        self, tokenizer: "Tokenizer", template: "Template | None", specials: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._specials = specials
        self.encode = lru_cache(maxsize=512)(self._encode)
        self.assistant_end = self._read_template() if template else ""

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
        return cls(tokenizer, _load_template(directory, config), _special_tokens(config))

    def _encode(self, text: str) -> TokenIds:
        return token_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_start(self, text: str) -> TokenIds:
        """Tokenise the start of a plain-text prompt, with the model's leading special tokens."""
        return token_ids(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: TokenIds) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def render(self, messages: Sequence[Message], *, open_answer: bool = False) -> str:
        """Render `messages` with the model's template; `open_answer` adds the start of an assistant turn."""
        if self._template is None:
            raise InputError("this model has no chat template: write plain text instead of ps.user(...)")
        return self._template.render(messages=messages, add_generation_prompt=open_answer, **self._specials)

    def _read_template(self) -> str:
        """Check that rendering is prefix-stable and return the text that ends an assistant turn."""
        messages: list[Message] = []
        before = ""
        for role, content in (
            ("user", "a"),
            ("assistant", _PROBE),
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
        return self.render(messages[:2]).partition(_PROBE)[2]


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


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a stretch of a prompt comes from: its source line, its kind, and where it ends (in tokens)."""

    label: str
    end: int


@dataclass(slots=True)
class Conversation:
    """The growing token ids of one branch of a program, with the messages they stand for.

    `_skeleton` is what the template is rendered with: the messages, but a neutral text in place of each
    generated answer, so that no template can treat a conversation differently for what a model said.
    """

    chat: ChatFormat
    encode: Encode
    ids: TokenIds = field(default_factory=token_ids)
    segments: tuple[Segment, ...] = ()
    messages: tuple[Message, ...] = ()
    _skeleton: tuple[Message, ...] = ()
    _rendered: str = ""

    def fork(self) -> "Conversation":
        """Return an independent copy; only the ids are really copied."""
        return replace(self, ids=self.ids[:])

    def add(self, prompt: Prompt, label: str) -> None:
        """Append messages and text. Raises InputError when chat messages and plain text are mixed."""
        for part in prompt.parts:
            if part.role is None:
                self._add_text(part.text, label)
            else:
                self._add_message(part.role, part.text, label)

    def open_answer(self, label: str) -> None:
        """Begin an assistant turn, so that the next ids are the model's. No-op in plain text."""
        if self.messages:
            opened = self.chat.render(self._skeleton, open_answer=True)
            self._append(self.encode(opened[len(self._rendered) :]), f"gen {label}")

    def close_answer(self, ids: TokenIds, text: str, label: str) -> None:
        """Append a generation: the ids as generated, then what ends an assistant turn."""
        if self.messages:
            end = self.encode(self.chat.assistant_end)
            ids = _without_end(ids, end) + end
            self._add_to_chat("assistant", text, skeleton=_PROBE)
        self._append(ids, f"output {label}")

    def _add_text(self, text: str, label: str) -> None:
        if self.messages:
            raise InputError(f"{label}: plain text after chat messages; wrap it in ps.user(...)")
        if not self.ids:
            self.ids.extend(self.chat.encode_start(""))
        self._append(self.encode(text), f"text {label}")

    def _add_message(self, role: Role, text: str, label: str) -> None:
        if self.ids and not self.messages:
            raise InputError(f"{label}: a chat message after plain text; use one or the other")
        before = self._rendered
        self._add_to_chat(role, text, skeleton=text)
        self._append(self.encode(self._rendered[len(before) :]), f"{role} {label}")

    def _add_to_chat(self, role: Role, text: str, *, skeleton: str) -> None:
        self.messages += ({"role": role, "content": text},)
        self._skeleton += ({"role": role, "content": skeleton},)
        self._rendered = self.chat.render(self._skeleton)

    def _append(self, ids: TokenIds, label: str) -> None:
        self.ids.extend(ids)
        self.segments += (Segment(label, len(self.ids)),)


def _without_end(ids: TokenIds, end: TokenIds) -> TokenIds:
    """Drop the end-of-turn token from a generation that stopped by itself: the template's end has it."""
    return ids[:-1] if ids and end and ids[-1] == end[0] else ids
