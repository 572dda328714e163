"""One call's answer, put together from as many attempts as it takes.

When a runtime is lost or gives a call up in the middle of its answer, what it has streamed stays:

- *continue*: the next runtime gets the prompt and the tokens that were generated, and goes on behind them.
- *replay*: where that would change the answer, it gets the prompt alone and says the beginning again, which
  is compared with what was streamed and not streamed twice. Needed if the runtime's state is more than its
  tokens: a grammar, penalties, log-probabilities, images, a stop string or a character that is half there.

Only if a replay differs, which a greedy or seeded call's does not, the answer begins anew, and whoever
listens is told so by the number that comes with each chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from preble_sgl.core import (
    Chunk,
    Completion,
    OnChunk,
    Request,
    TokenIds,
    Usage,
    new_request_id,
    token_ids,
)


class Answering:
    """The answer to one request so far. `decode` gives the text of tokens, special ones left out."""

    def __init__(
        self, request: Request, decode: Callable[[TokenIds], str], on_chunk: OnChunk | None = None
    ) -> None:
        self._request = request
        self._decode = decode
        self._on_chunk = on_chunk
        self._number = 0
        self._ids = token_ids()
        self._text = ""
        self._last: Chunk | None = None
        self._repeat: _Repeat | None = None
        self._num_given = 0
        self.num_attempts = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens were streamed."""
        return len(self._ids)

    def next_request(self) -> Request:
        """Return what to ask the next runtime for.

        Each attempt has an id of its own on the wire: a runtime that hung may still know the one before.
        """
        self._repeat, self._num_given = None, 0
        if not self._ids:
            request = self._request
        elif self._can_continue():
            self._num_given = len(self._ids)
            request = _continued(self._request, self._ids)
        else:
            self._repeat = _Repeat(self._ids[:], self._text)
            request = self._request
        self.num_attempts += 1
        return request if self.num_attempts == 1 else replace(request, request_id=new_request_id())

    def take(self, chunk: Chunk) -> None:
        """Add what a runtime streamed, and pass on what is new of it."""
        if self._repeat:
            chunk = self._compared(self._repeat, chunk)
        if self._num_given:
            chunk = self._told_of_whole(chunk)
        self._ids += chunk.output_ids
        self._text += chunk.text
        self._last = chunk
        if self._on_chunk and (chunk.output_ids or chunk.text or chunk.finish_reason):
            self._on_chunk(chunk, self._number)

    def completion(self) -> Completion:
        """Return the whole answer, once its last chunk was taken."""
        last = self._last
        assert last is not None, "an answer has at least one chunk"
        assert last.finish_reason is not None, "a stream ends with a finish reason"
        return Completion(
            self._ids, self._text, last.finish_reason, last.usage, last.logprobs, last.output_logprobs
        )

    def _can_continue(self) -> bool:
        request, sampling = self._request, self._request.sampling
        return (
            len(self._ids) < sampling.max_new_tokens
            and not (sampling.regex or sampling.json_schema)
            and not (sampling.frequency_penalty or sampling.presence_penalty)
            and request.num_top_logprobs is None
            and request.score_from is None
            and not request.images
            and not any(_begins_at_end(stop, self._text) for stop in sampling.stop)
            and self._decode(self._ids) == self._text
        )

    def _compared(self, repeat: "_Repeat", chunk: Chunk) -> Chunk:
        """Return what a repeating runtime says that was not streamed before, or all of it if it differs."""
        new = repeat.take(chunk)
        if repeat.is_over:
            self._repeat = None
        if new is None:
            self._repeat = None
            self._number += 1
            self._ids, self._text = token_ids(), ""
            return replace(chunk, output_ids=repeat.ids, text=repeat.text)
        return new

    def _told_of_whole(self, chunk: Chunk) -> Chunk:
        """Return the chunk with the usage of the whole call: part of its output was prompt to the runtime."""
        if chunk.finish_reason is None:
            return chunk
        prompt_len, usage = len(self._request.prompt), chunk.usage
        whole = Usage(prompt_len, min(usage.cached_tokens, prompt_len), usage.output_tokens + self._num_given)
        return replace(chunk, usage=whole)


class _Repeat:
    """A beginning that was streamed, and what a runtime says again of it: `ids` and `text`."""

    def __init__(self, known_ids: TokenIds, known_text: str) -> None:
        self._known_ids = known_ids
        self._known_text = known_text
        self.ids = token_ids()
        self.text = ""

    @property
    def is_over(self) -> bool:
        """Whether all that was streamed has been said again."""
        return len(self.ids) >= len(self._known_ids) and len(self.text) >= len(self._known_text)

    def take(self, chunk: Chunk) -> Chunk | None:
        """Return what is new of a chunk; None if it shows that this is another answer."""
        num_ids, num_chars = len(self.ids), len(self.text)
        self.ids = self.ids + chunk.output_ids
        self.text += chunk.text
        ends_early = chunk.finish_reason is not None and not self.is_over
        if ends_early or not (_agree(self.ids, self._known_ids) and _agree(self.text, self._known_text)):
            return None
        return replace(
            chunk,
            output_ids=self.ids[max(num_ids, len(self._known_ids)) :],
            text=self.text[max(num_chars, len(self._known_text)) :],
        )


def _continued(request: Request, ids: TokenIds) -> Request:
    sampling = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - len(ids))
    return replace(request, prompt=request.prompt + ids, sampling=sampling)


def _begins_at_end(stop: str, text: str) -> bool:
    """Return whether `text` ends with the beginning of a stop string, which may then go on elsewhere."""
    return any(text.endswith(stop[:length]) for length in range(1, len(stop)))


def _agree(a: Sequence[object], b: Sequence[object]) -> bool:
    length = min(len(a), len(b))
    return a[:length] == b[:length]
