"""What work costs on one kind of worker, in seconds, as E2 prices it.

A profile is data with its source (`preble_sgl.profiles`). It answers two questions: PT, the seconds to
prefill some new tokens behind a context that is already cached, and DT, the seconds that decoding adds. Both
are *worker seconds*: a decode step serves the whole batch, so one request is charged its share of the step
and not the time it watches pass. Both never fall below zero and never shrink with more tokens.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from preble_sgl.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """What attention adds to a prefill of q new tokens in a sequence of c tokens, once q·c is large."""

    per_new_token_s: float
    per_sequence_token_s: float
    per_pair_s: float
    min_pairs: int
    per_square_s: float = 0.0

    def seconds(self, new_len: int, sequence_len: int) -> float:
        """Return the extra seconds; 0 until the number of token pairs exceeds `min_pairs`."""
        pairs = new_len * sequence_len
        if pairs <= self.min_pairs:
            return 0.0
        return (
            self.per_new_token_s * new_len
            + self.per_sequence_token_s * sequence_len
            + self.per_pair_s * pairs
            + self.per_square_s * sequence_len * sequence_len
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """Linear costs of one model on one kind of worker.

    `floor_s`: the shortest iteration. `base_s`, `token_s`: the line above it. `context_s`: reading one token
    of the sequence. `decode_token_s`: worker seconds per output token and request. `step_request_s`: by how
    much each further request makes a decode step longer for all that are in it. `shared_prefix`: its decode
    steps read what requests share once, so that siblings decode cheaper together.
    """

    name: str
    source: str
    floor_s: float
    base_s: float
    token_s: float
    decode_token_s: float
    context_s: float = 0.0
    step_request_s: float = 0.0
    attention: AttentionCost | None = None
    shared_prefix: bool = False

    def __post_init__(self) -> None:
        costs = (
            self.floor_s,
            self.base_s,
            self.token_s,
            self.decode_token_s,
            self.context_s,
            self.step_request_s,
        )
        if min(costs) < 0:
            raise InputError(f"cost profile {self.name}: every cost must be 0 or more")

    def batch_s(self, new_len: int) -> float:
        """Return the seconds to prefill `new_len` tokens of any prompts together, attention left out."""
        if new_len <= 0:
            return 0.0
        return max(self.floor_s, self.base_s + self.token_s * new_len)

    def step_s(self, num_requests: int) -> float:
        """Return the seconds of one decode step of so many requests."""
        return self.floor_s + self.step_request_s * num_requests

    def attention_s(self, new_len: int, context_len: int = 0) -> float:
        """Return the seconds of a prefill that attention adds to the line."""
        if new_len <= 0:
            return 0.0
        sequence_len = context_len + new_len
        attention_s = self.attention.seconds(new_len, sequence_len) if self.attention else 0.0
        return attention_s + self.context_s * sequence_len

    def prefill_s(self, new_len: int, context_len: int = 0) -> float:
        """Return PT: the seconds to prefill `new_len` tokens of a prompt behind `context_len` cached ones."""
        return self.batch_s(new_len) + self.attention_s(new_len, context_len)

    def shared_s(self, shared_len: int, output_len: float) -> float:
        """Return the seconds of decoding that are saved where others read `shared_len` tokens, too."""
        return self.context_s * shared_len * output_len if self.shared_prefix else 0.0

    def decode_s(self, output_len: float) -> float:
        """Return DT: the worker seconds that decoding `output_len` tokens of one request takes."""
        return self.decode_token_s * output_len


@lru_cache
def with_shared_prefix(profile: CostProfile) -> CostProfile:
    """Return the profile of the same worker when its decode steps read a shared prefix once."""
    return replace(profile, shared_prefix=True)
