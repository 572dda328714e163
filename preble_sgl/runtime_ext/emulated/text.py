"""Text to token ids and made-up answers back to text, with a model's tokenizer or without any.

Answers are words that depend on the prompt alone, so equal prompts get equal answers, and a shorter answer is
the beginning of a longer one. Without a model a token is up to five characters of a word and the space after
it; answers are made of words that are one token each, so a conversation sent back as text becomes the very
ids that were generated, and the cache has them.
"""

import hashlib
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.model_files import require_model, vocab_size

if TYPE_CHECKING:
    from jinja2 import Template

VOCAB_SIZE = 128_256
MAX_IDS = 2**31
PIECE = re.compile(r"\S{1,5}\s?|\s{1,8}")
CONSONANTS, VOWELS = "bdfghjklmnprstv", "aeiou"
WORD_TOKEN = re.compile("[Ġ▁][a-z]{2,8}")
"""A token of a byte-level or a SentencePiece vocabulary that is a plain word after a space."""

Word = tuple[int, str]
Message = Mapping[str, Any]


class Codec(Protocol):
    """How an emulated runtime reads prompts and what it answers with.

    `words`: one token each. `num_ids`: token ids up to this one, without it, are accepted in prompts.
    """

    words: Sequence[Word]
    num_ids: int

    def encode(self, text: str, *, is_chat: bool) -> TokenIds:
        """Tokenise a prompt; one that is no rendered chat gets the model's leading special tokens."""
        ...

    def render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        """Return a conversation as the text that the model would read, ready for its answer."""
        ...


@dataclass(frozen=True, slots=True)
class Script:
    """A whole answer, known beforehand: `text[: ends[i]]` is the text of the first i tokens of `ids`."""

    ids: TokenIds
    text: str
    ends: Sequence[int]


def script_for(prompt: TokenIds, num_tokens: int, words: Sequence[Word]) -> Script:
    """Make up the answer to a prompt. Deterministic; O(prompt + answer)."""
    seed = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    chosen = random.Random(int.from_bytes(seed, "big")).choices(words, k=num_tokens)
    ends = list(accumulate((len(text) for _, text in chosen), initial=0))
    return Script(token_ids(token for token, _ in chosen), "".join(text for _, text in chosen), ends)


class PseudoCodec:
    """Stands in for a tokenizer: about four characters a token, ids from a hash, chat as `role: content`."""

    num_ids = MAX_IDS  # whatever tokenizer a client may use

    def __init__(self) -> None:
        syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
        texts = [f"{first}{second} " for first, second in product(syllables, syllables)]
        self.words: Sequence[Word] = [(_pseudo_id(text), text) for text in texts]

    def encode(self, text: str, *, is_chat: bool) -> TokenIds:
        """Cut a text into pieces. O(text)."""
        return token_ids(map(_pseudo_id, PIECE.findall(text)))

    def render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        """Write one line per message, after the tools as JSON."""
        head = f"tools: {orjson.dumps(tools).decode()}\n" if tools else ""
        lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return f"{head}{lines}assistant: "


class ModelCodec:
    """A Hugging Face model's tokenizer and chat template, and the plain words of its vocabulary."""

    def __init__(self, model_path: Path) -> None:
        from tokenizers import Tokenizer

        require_model(model_path)
        self._tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        self.num_ids = vocab_size(str(model_path)) or self._tokenizer.get_vocab_size()
        self._settings = _read_json(model_path / "tokenizer_config.json")
        self._template = _template(model_path, self._settings)
        known = sorted((number, token) for token, number in self._tokenizer.get_vocab().items())
        self.words: Sequence[Word] = [
            (number, f" {token[1:]}") for number, token in known if WORD_TOKEN.fullmatch(token)
        ]
        if not self.words:
            raise InputError(f"{model_path}: the vocabulary has no plain words to answer with; leave it out")

    def encode(self, text: str, *, is_chat: bool) -> TokenIds:
        """Tokenise as the model would have it."""
        return token_ids(self._tokenizer.encode(text, add_special_tokens=not is_chat).ids)

    def render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        """Render with the model's chat template. Raises InputError if it has none or refuses."""
        if self._template is None:
            raise InputError("the model has no chat template: use /v1/completions or /generate")
        specials = {name: _token_text(self._settings.get(name)) for name in ("bos_token", "eos_token")}
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=True, **specials
            )
        except Exception as error:  # whatever a template does with a conversation that it does not expect
            raise InputError(f"the chat template cannot render these messages: {error}") from error


def load_codec(model_path: str | None) -> Codec:
    """Return the model's codec, or the made-up one. Raises InputError for a directory that is no model."""
    return ModelCodec(Path(model_path)) if model_path else PseudoCodec()


def _pseudo_id(piece: str) -> int:
    return zlib.crc32(piece.encode(errors="surrogatepass")) % VOCAB_SIZE


def _read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return loaded


def _template(model_path: Path, settings: Mapping[str, Any]) -> "Template | None":
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = model_path / "chat_template.jinja"
    source = file.read_text() if file.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: orjson.dumps(value).decode()
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise InputError(message)


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else token or ""
