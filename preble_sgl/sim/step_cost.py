"""How long one iteration of a runtime takes.

    T = max(floor, base + token · n + request · b) + [prefill] + context · C + sum of attention(q, c)

n: new tokens of the iteration, one for each decoding request; b: requests in it; C: tokens of KV that it
reads; q, c: a prefill's new tokens, and the length of its sequence with them. [prefill] is paid once by an
iteration that prefills anything: its batch is put together anew, and no recorded graph of kernels is
replayed for it. The intercept is paid once per iteration, however many requests share it, and no term is ever
negative. (Preble's equations charge it per request for 70B models and have a branch that turns negative;
`profiles` says what was corrected where.)
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from preble_sgl.errors import InputError

Prefill = tuple[int, int]
"""New tokens of one prompt in this iteration, and the length of the sequence they complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The coefficients, in seconds. Attention costs count beyond `min_pairs` pairs q · c of a prefill.

    `square_s` · c²: for runtimes that compute attention over the cached prefix again, as SGLang does on CPUs.
    """

    floor_s: float
    base_s: float
    token_s: float
    request_s: float = 0.0
    prefill_s: float = 0.0
    context_s: float = 0.0
    attention_new_s: float = 0.0
    attention_sequence_s: float = 0.0
    attention_pair_s: float = 0.0
    attention_square_s: float = 0.0
    min_pairs: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise InputError(f"step cost: {field.name}={getattr(self, field.name)}, must be 0 or more")

    def seconds(self, prefills: Iterable[Prefill], num_decodes: int = 0, decode_context: int = 0) -> float:
        """Return T of an iteration of some prefills and `num_decodes` requests with `decode_context` tokens.

        An iteration of nothing takes no time. O(prefills).
        """
        num_new, num_requests, context, attention_s = num_decodes, num_decodes, decode_context, 0.0
        for new_len, sequence_len in prefills:
            num_new += new_len
            num_requests += 1
            context += sequence_len
            attention_s += self.attention(new_len, sequence_len)
        if not num_requests:
            return 0.0
        prefill_s = self.prefill_s if num_requests > num_decodes else 0.0
        return self._linear(num_new, num_requests) + prefill_s + self.context_s * context + attention_s

    def decodes(self, num_steps: int, num_decodes: int, context: int) -> float:
        """Return the seconds of `num_steps` decode steps, `context` tokens at first, b more each. O(1)."""
        reads = num_steps * context + num_decodes * (num_steps * (num_steps - 1) // 2)
        return num_steps * self._linear(num_decodes, num_decodes) + self.context_s * reads

    def attention(self, new_len: int, sequence_len: int) -> float:
        """Return what attention adds for one prefill, beyond reading its context once."""
        pairs = new_len * sequence_len
        if pairs <= self.min_pairs:
            return 0.0
        return (
            self.attention_new_s * new_len
            + self.attention_sequence_s * sequence_len
            + self.attention_pair_s * pairs
            + self.attention_square_s * sequence_len * sequence_len
        )

    def _linear(self, num_new: int, num_requests: int) -> float:
        line_s = self.base_s + self.token_s * num_new + self.request_s * num_requests
        return line_s if line_s > self.floor_s else self.floor_s
