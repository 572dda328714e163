"""Tokenise a text part by part, so that a conversation that grew is not tokenised from its start again.

A tokenizer of the `tokenizers` library cuts a text at the model's special tokens before it does anything
else, so the stretches between them are independent: the tokens of `<|im_start|>user\\nhi` are the same
whatever follows the next special token. Each stretch with the special token before it is tokenised once and
remembered. Where a tokenizer does not keep to that (some strip blanks beside a special token), which a few
texts show when it is loaded, the whole text is tokenised every time.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from preble_sgl.core import TokenIds, token_ids

MOST_CHARS = 64 * 2**20
"""Of remembered stretches: about as many bytes again for their tokens."""

_PROBES = ("{0}user\na b{1}", " {0} x {1} \n{0}", "{0}\n\nx{1}{0}assistant\n", "x{0}1{1}2 {0}Ünïcødé 語{1}")


class SegmentEncoder:
    """Tokenises texts as `tokenizer.encode(text, add_special_tokens=False)` does."""

    def __init__(self, tokenizer: Any, *, most_chars: int = MOST_CHARS) -> None:
        self._tokenizer = tokenizer
        self._most_chars = most_chars
        self._num_chars = 0
        self._known: OrderedDict[str, TokenIds] = OrderedDict()
        specials = _special_tokens(tokenizer)
        self._cuts = re.compile("|".join(map(re.escape, specials))) if specials else None
        if self._cuts and not all(self._is_exact(probe) for probe in _probes(specials)):
            self._cuts = None

    @property
    def cuts(self) -> bool:
        """Whether texts are tokenised in parts."""
        return self._cuts is not None

    def encode(self, text: str) -> TokenIds:
        """Return the tokens of a text. O(text) to cut it, and to tokenise what is new of it."""
        ids = token_ids()
        for segment in self._segments(text):
            ids += self._encoded(segment)
        return ids

    def unknown_len(self, text: str) -> int:
        """Return how many characters of a text would have to be tokenised."""
        return sum(len(segment) for segment in self._segments(text) if segment not in self._known)

    def _segments(self, text: str) -> Iterator[str]:
        """Cut a text before each special token."""
        start = 0
        for cut in self._cuts.finditer(text) if self._cuts else ():
            if cut.start() > start:
                yield text[start : cut.start()]
            start = cut.start()
        if text[start:]:
            yield text[start:]

    def _encoded(self, segment: str) -> TokenIds:
        ids = self._known.get(segment)
        if ids is None:
            ids = token_ids(self._tokenizer.encode(segment, add_special_tokens=False).ids)
            self._remember(segment, ids)
        else:
            self._known.move_to_end(segment)
        return ids

    def _remember(self, segment: str, ids: TokenIds) -> None:
        self._known[segment] = ids
        self._num_chars += len(segment)
        while self._num_chars > self._most_chars:
            forgotten, _ = self._known.popitem(last=False)
            self._num_chars -= len(forgotten)

    def _is_exact(self, text: str) -> bool:
        whole = token_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return self.encode(text) == whole


def _special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that are tokens whatever surrounds them, longest first; none if nobody knows them."""
    added: dict[int, Any] = getattr(tokenizer, "get_added_tokens_decoder", dict)()
    texts = {token.content for token in added.values() if not (token.lstrip or token.rstrip)}
    return sorted(texts, key=len, reverse=True)


def _probes(specials: list[str]) -> Iterator[str]:
    """Yield texts that show whether cutting at special tokens changes what they become."""
    for first, second in zip(specials, specials[1:] + specials[:1], strict=True):
        yield from (probe.format(first, second) for probe in _PROBES)
