"""The growing conversation of one branch of a program, as exact token ids.

A conversation only ever grows: a message adds what the chat template adds for it, a generation appends the
ids that the runtime really produced. So the ids sent with one call are a prefix of the ids sent with the
next, and a runtime finds all of them in its cache.

An image has no ids until a runtime has seen it. Stand-ins made from its content take their place, so that
prompts with different images share nothing beyond them; what is sent then is text and images.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from preble_sgl.core import Message, TokenIds, token_ids
from preble_sgl.dsl.chat import EMPTY, ChatFormat, Skeleton
from preble_sgl.dsl.ops import Part, Prompt
from preble_sgl.errors import InputError

Encode = Callable[[str], TokenIds]

IMAGE_LEN = 256
"""Tokens that an image is assumed to take; what it really takes depends on the model and its size."""

_IMAGE_BASE = 1 << 30  # above every vocabulary


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a stretch of a prompt comes from: its source line, its kind, and where it ends (in tokens)."""

    label: str
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """How far a conversation has come. Never changes; two are equal only if they are the same object.

    The template is given a neutral text in place of each generated answer, so that it cannot treat a
    conversation differently for what a model said: `skeleton` has those texts, `messages` the real ones.
    """

    ids: TokenIds = field(default_factory=token_ids)
    segments: tuple[Segment, ...] = ()
    messages: tuple[Message, ...] = ()
    images: tuple[str, ...] = ()
    skeleton: Skeleton = EMPTY

    def extended(self, ids: TokenIds, label: str) -> "Position":
        """Return the position after `ids`."""
        longer = self.ids + ids
        segments = (*self.segments, Segment(label, len(longer)))
        return Position(longer, segments, self.messages, self.images, self.skeleton)


START = Position()


class Conversation:
    """One branch's position, and how it moves on."""

    def __init__(self, chat: ChatFormat, encode: Encode, at: Position = START) -> None:
        self.chat = chat
        self._encode = encode
        self._at = at

    @property
    def ids(self) -> TokenIds:
        """The exact token ids so far."""
        return self._at.ids

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Where each stretch of the ids comes from."""
        return self._at.segments

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat so far, generated answers included."""
        return self._at.messages

    @property
    def images(self) -> tuple[str, ...]:
        """The images so far."""
        return self._at.images

    def fork(self) -> "Conversation":
        """Return an independent copy. O(1)."""
        return Conversation(self.chat, self._encode, self._at)

    def add(self, prompt: Prompt, label: str) -> None:
        """Append messages and text. Raises InputError when chat messages and plain text are mixed."""
        if prompt.has_hole:
            self._at = _added(self.chat, self._at, prompt, label, self._encode)
        else:
            self._at = self.chat.remember(_added, self._at, prompt, label)

    @contextmanager
    def answering(self, label: str) -> Iterator[None]:
        """Begin an assistant turn, so that the next ids are the model's; an error takes it back."""
        before = self._at
        if self.messages:
            opened = self._encode(self.chat.opened(before.skeleton))
            self._at = before.extended(opened, f"gen {label}")
        try:
            yield
        except BaseException:
            self._at = before
            raise

    def close_answer(self, ids: TokenIds, text: str, label: str) -> None:
        """Append a generation: the ids as generated, then what ends an assistant turn."""
        at = self._at
        if at.messages:
            end = self.chat.encode(self.chat.assistant_end)
            ids = _without_end(ids, end) + end
            said = {"role": "assistant", "content": text}
            at = replace(at, messages=(*at.messages, said), skeleton=self.chat.answered(at.skeleton))
        self._at = at.extended(ids, f"output {label}")

    def prior(self) -> TokenIds:
        """Return the shortest prompt that an answer could follow.

        Raises InputError in plain text when the model has no token that begins a text.
        """
        if self.messages:
            return self.chat.encode(self.chat.opened(self._at.skeleton))
        start = self.chat.encode_start("")
        if not start:
            raise InputError("rule='vs_prior' needs a model whose texts begin with a special token")
        return start

    def text(self) -> str:
        """Return the chat as text with an assistant's turn begun, for servers that take text."""
        return self.chat.render([_for_template(message) for message in self.messages], open_answer=True)


def _added(
    chat: ChatFormat, at: Position, prompt: Prompt, label: str, encode: Encode | None = None
) -> Position:
    """Return the position after a prompt. A function, so that a format can remember what came of it."""
    for part in prompt.parts:
        step = _with_text if part.role is None else _with_message
        at = step(chat, at, part, label, encode or chat.encode)
    return at


def _with_text(chat: ChatFormat, at: Position, part: Part, label: str, encode: Encode) -> Position:
    if at.messages:
        raise InputError(f"{label}: plain text after chat messages; wrap it in ps.user(...)")
    start = token_ids() if at.ids else chat.encode_start("")
    return at.extended(start + encode(part.text), f"text {label}")


def _with_message(chat: ChatFormat, at: Position, part: Part, label: str, encode: Encode) -> Position:
    if at.ids and not at.messages:
        raise InputError(f"{label}: a chat message after plain text; use one or the other")
    role = chat.tool_role if part.role == "tool" else str(part.role)
    skeleton, added = chat.extended(at.skeleton, role, part.text, len(part.images))
    ids = encode(added)
    for image in reversed(part.images):
        ids = _stand_ins(image) + ids
    messages = (*at.messages, {"role": role, "content": _content(part)})
    at = Position(at.ids, at.segments, messages, at.images + part.images, skeleton)
    return at.extended(ids, f"{role} {label}")


def _content(part: Part) -> str | list[dict[str, object]]:
    """Return the content of a message as OpenAI's API has it."""
    if not part.images:
        return part.text
    images: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": image}} for image in part.images
    ]
    return [*images, {"type": "text", "text": part.text}]


def _for_template(message: Message) -> Message:
    """Return a message with its images as chat templates know them."""
    if isinstance(message["content"], str):
        return message
    parts = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
    return {**message, "content": parts}


def _stand_ins(image: str) -> TokenIds:
    """Return ids for an image that no text has, the same for the same image."""
    digest = hashlib.blake2b(image.encode(), digest_size=4).digest()
    first = _IMAGE_BASE + int.from_bytes(digest, "big") % (1 << 29)
    return token_ids(range(first, first + IMAGE_LEN))


def _without_end(ids: TokenIds, end: TokenIds) -> TokenIds:
    """Drop the end-of-turn token from a generation that stopped by itself: the template's end has it."""
    return ids[:-1] if ids and end and ids[-1] == end[0] else ids
