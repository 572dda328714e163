"""Counts of a plan that depend on what will be generated: at least, expected, at most.

A call is *certain* if it comes before the first decision of its row; the others are made in some readings.

- Calls and prompt tokens of a row: the least and the most of its readings, and their weighted mean.
- Reusable tokens: what the certain calls share among themselves, counted exactly. Every other call adds at
  least what it shares with certain calls and with earlier calls of its own reading, and at most what it
  shares with any call of any reading, as if all generations said the same.

If a row may make calls that nobody has read, there is no upper bound. A generated text that is written into
another message is tokenised again; it is taken to have as many tokens as were generated, which holds for text
that a tokenizer would have cut the same way, and not for broken characters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from preble_sgl.core import common_prefix_len
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.prefix_counts import Prompts, as_if_equal, as_is, length_bounds, new_ranges, reuse_limit
from preble_sgl.dsl.tracer import HoleLen, Reading, TracedCall


@dataclass(frozen=True, slots=True)
class Bounds:
    """A count: at least, expected, at most (None: nobody knows)."""

    lower: int
    expected: float
    upper: int | None

    def __add__(self, other: "Bounds") -> "Bounds":
        upper = None if self.upper is None or other.upper is None else self.upper + other.upper
        return Bounds(self.lower + other.lower, self.expected + other.expected, upper)

    def __contains__(self, served: int) -> bool:
        """Whether a count that was served lies within."""
        return self.lower <= served and (self.upper is None or served <= self.upper)

    def __str__(self) -> str:
        if self.lower == self.upper:
            return f"{self.lower:,}"
        upper = "∞" if self.upper is None else f"{self.upper:,}"
        return f"{self.lower:,} – {self.expected:,.0f} – {upper}"


NONE = Bounds(0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class PlanBounds:
    """What a batch will do: calls, tokens of their prompts, and how many of those need not be computed."""

    calls: Bounds
    prompt_tokens: Bounds
    reusable_tokens: Bounds


def plan_bounds(traces: Sequence[Trace]) -> PlanBounds:
    """Return the bounds of a batch. O(n log n) in the calls of all readings."""
    return PlanBounds(
        _total(traces, lambda reading, call: (1, 1, 1)),
        _total(traces, _prompt_len),
        _reusable(traces),
    )


Measure = Callable[[Reading, TracedCall], tuple[int, int, int]]
"""What one call of a reading counts: at least, expected, at most."""


def _total(traces: Sequence[Trace], measure: Measure) -> Bounds:
    total = NONE
    for trace in traces:
        total += _row_bounds(_standing_for(trace, traces), measure)
    return total


def _standing_for(trace: Trace, traces: Sequence[Trace]) -> Trace:
    return trace if trace.like is None else traces[trace.like]


def _row_bounds(trace: Trace, measure: Measure) -> Bounds:
    """Return the bounds of one row over its readings."""
    sums = [_sum(measure(reading, call) for call in reading.calls) for reading in trace.readings]
    expected = sum(weight * one[1] for weight, one in zip(trace.weights, sums, strict=True))
    if not trace.is_complete:
        lower = _sum(measure(trace.readings[0], call) for call in trace.certain)[0]
        return Bounds(lower, expected, None)
    upper = None if trace.is_open else max(one[2] for one in sums)
    return Bounds(min(one[0] for one in sums), expected, upper)


def _sum(counts: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    lower = expected = upper = 0
    for low, mean, high in counts:
        lower, expected, upper = lower + low, expected + mean, upper + high
    return lower, expected, upper


def _prompt_len(reading: Reading, call: TracedCall) -> tuple[int, int, int]:
    lower, upper = length_bounds(call.request.prompt, reading.holes)
    return lower, len(call.request.prompt), upper


def _reusable(traces: Sequence[Trace]) -> Bounds:
    holes = {id(call): trace.readings[0].holes for trace in traces for call in trace.certain}
    certain = [call for trace in traces for call in trace.certain]
    shared = _shared_among(certain, holes)
    if all(len(trace.certain) == len(trace.readings[0].calls) for trace in traces):
        return Bounds(shared.lower, shared.expected, None if any(t.is_open for t in traces) else shared.upper)
    sure = Prompts(certain)
    every = {id(call): call for trace in traces for reading in trace.readings for call in reading.calls}
    anything = Prompts(every.values())
    if_equal = Prompts(every.values(), as_if_equal)
    for trace in traces:
        shared += _row_reuse(_standing_for(trace, traces), sure, anything, if_equal)
    return shared


def _shared_among(calls: Sequence[TracedCall], holes: dict[int, tuple[HoleLen, ...]]) -> Bounds:
    """Return what calls that are all made share: exactly, but for the lengths of generations in it."""
    lower = upper = expected = 0
    for call, new in new_ranges(calls, as_is):
        lower += length_bounds(call.request.prompt[: new.start], holes[id(call)])[0]
        expected += new.start
    for call, new in new_ranges(calls, as_if_equal):
        upper += length_bounds(call.request.prompt[: new.start], holes[id(call)])[1]
    return Bounds(lower, expected, upper)


def _row_reuse(trace: Trace, sure: Prompts, anything: Prompts, if_equal: Prompts) -> Bounds:
    """Return what the calls of a row that are not certain reuse."""
    num_certain = len(trace.certain)

    def measure(reading: Reading, call: TracedCall) -> tuple[int, int, int]:
        place = next(i for i, other in enumerate(reading.calls) if other is call)
        if place < num_certain:
            return 0, 0, 0
        prompt = call.request.prompt
        least = max(sure.shared_len(call), _shared_with(reading.calls[:place], call))
        most = if_equal.shared_len(call)
        lower = length_bounds(prompt[:least], reading.holes)[0]
        upper = length_bounds(prompt[:most], reading.holes)[1]
        return lower, anything.shared_len(call), upper

    return _row_bounds(trace, measure)


def _shared_with(earlier: Sequence[TracedCall], call: TracedCall) -> int:
    """Return how much of a prompt calls before it in the same reading have."""
    packed = call.request.prompt.tobytes()
    shared = (
        common_prefix_len(packed, (other.request.prompt + other.output[:-1]).tobytes()) for other in earlier
    )
    return min(max(shared, default=0), reuse_limit(call))
