"""What work costs on one kind of worker, in seconds, as E2 prices it.

A profile is data with its source. It answers two questions: PT, the seconds to prefill some new tokens
behind a context that is already cached, and DT, the seconds that decoding adds. Both are *worker seconds*:
a decode step serves the whole batch, so one request is charged its share of the step and not the time it
watches pass. Both never fall below zero and never shrink with more tokens.
"""

from dataclasses import dataclass

from preble_sgl.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """What attention adds to a prefill of q new tokens in a sequence of c tokens, once q·c is large."""

    per_new_token_s: float
    per_sequence_token_s: float
    per_pair_s: float
    min_pairs: int

    def seconds(self, new_len: int, sequence_len: int) -> float:
        """Return the extra seconds; 0 until the number of token pairs exceeds `min_pairs`."""
        pairs = new_len * sequence_len
        if pairs <= self.min_pairs:
            return 0.0
        return (
            self.per_new_token_s * new_len
            + self.per_sequence_token_s * sequence_len
            + self.per_pair_s * pairs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """Linear costs of one model on one kind of worker.

    `floor_s`: the shortest prefill iteration. `base_s`, `token_s`: the line above it.
    `decode_token_s`: worker seconds per output token and request. `step_request_s`: by how much each further
    request makes a decode step longer for all that are in it.
    """

    name: str
    source: str
    floor_s: float
    base_s: float
    token_s: float
    decode_token_s: float
    step_request_s: float = 0.0
    attention: AttentionCost | None = None

    def __post_init__(self) -> None:
        if min(self.floor_s, self.base_s, self.token_s, self.decode_token_s, self.step_request_s) < 0:
            raise InputError(f"cost profile {self.name}: every cost must be 0 or more")

    def batch_s(self, new_len: int) -> float:
        """Return the seconds to prefill `new_len` tokens of any prompts together, attention left out."""
        if new_len <= 0:
            return 0.0
        return max(self.floor_s, self.base_s + self.token_s * new_len)

    def attention_s(self, new_len: int, context_len: int = 0) -> float:
        """Return the seconds of a prefill that attention adds to the line."""
        return self.attention.seconds(new_len, context_len + new_len) if self.attention else 0.0

    def prefill_s(self, new_len: int, context_len: int = 0) -> float:
        """Return PT: the seconds to prefill `new_len` tokens of a prompt behind `context_len` cached ones."""
        return self.batch_s(new_len) + self.attention_s(new_len, context_len)

    def decode_s(self, output_len: float) -> float:
        """Return DT: the worker seconds that decoding `output_len` tokens of one request takes."""
        return self.decode_token_s * output_len


_A6000_BUSY = 0.9  # Preble divides every A6000 prediction by this measured share of useful time

A6000_MISTRAL_7B = CostProfile(
    name="a6000-mistral-7b",
    source=(
        "Preble's profiling of Mistral-7B on an A6000 with SGLang of 2024 (model_equations.py): "
        "max(22, 0.10842571 n + 4.21) ms, without the branch that turns negative at 361..383 tokens, "
        "plus 0.32 ms of attention, plus 1.13e-3 q + 1.75e-3 c + 2.19e-6 q c ms beyond 1024² pairs, all "
        "over 0.9. Decode: a step of 32 requests with 2,048 tokens each takes 38.2 ms by the same "
        "equations, 1/32 of it per token (the 0.15 s of Preble's code is what one request watches pass, "
        "not what it occupies); "
        "a step of 64 takes 52 ms."
    ),
    floor_s=22.32e-3 / _A6000_BUSY,
    base_s=4.52978e-3 / _A6000_BUSY,
    token_s=0.10842571e-3 / _A6000_BUSY,
    decode_token_s=38.2e-3 / 32,
    step_request_s=(52e-3 - 38.2e-3) / 32,
    attention=AttentionCost(
        per_new_token_s=1.13e-6 / _A6000_BUSY,
        per_sequence_token_s=1.75e-6 / _A6000_BUSY,
        per_pair_s=2.19e-9 / _A6000_BUSY,
        min_pairs=1024 * 1024,
    ),
)

CPU_TINY = CostProfile(
    name="cpu-tiny",
    source=(
        "Measured on one core of a 2-core x86 machine: the tiny model of runtime_ext under SGLang 0.5.23, "
        "cold prompts, median time to first token of 7: 9.9 ms at 16 and 64 tokens, 12.1 at 128, 16.7 at "
        "256, 28.7 at 512, 56.6 at 1,024, 142 at 2,048, 381 at 4,096, 1,439 at 8,192; the line below is "
        "within 17 % of each. Decode: a step takes 4.19 ms with 1 request, 5.39 with 4, 7.25 with 8, 9.11 "
        "with 16; per token 1/8 of the step of 8."
    ),
    floor_s=9.9e-3,
    base_s=4.5e-3,
    token_s=47e-6,
    decode_token_s=7.25e-3 / 8,
    step_request_s=(9.11e-3 - 4.19e-3) / 15,
    attention=AttentionCost(
        per_new_token_s=0.0,
        per_sequence_token_s=0.0,
        per_pair_s=12e-9,
        min_pairs=1024 * 1024,
    ),
)
