"""Find the costs of an iteration from measured ones.

T is linear in its coefficients but for the floor and for the sign: none may be negative. For a given border
between the iterations on the floor and those on the line, the best non-negative solution by least squares is
the unbounded solution of some subset of the coefficients that has none below zero (the others are 0), and
there are few enough subsets to try all. So are the borders. Every sample is weighed by its own time, so that
what is minimised is the relative error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, TypeAlias

from preble_sgl.errors import InputError
from preble_sgl.sim.step_cost import Prefill, StepCost

Row: TypeAlias = list[float]

LINE = ("base_s", "token_s", "request_s")
COEFFICIENTS = (
    *("floor_s", *LINE, "prefill_s", "context_s"),
    *("attention_sequence_s", "attention_pair_s", "attention_square_s"),
)
SINGULAR = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one iteration does: some prefills, and decodes with `context` tokens together."""

    prefills: tuple[Prefill, ...] = ()
    num_decodes: int = 0
    context: int = 0

    @property
    def num_new(self) -> int:
        """New tokens."""
        return self.num_decodes + sum(new_len for new_len, _ in self.prefills)

    def features(self, *, on_floor: bool) -> Row:
        """Return what each of COEFFICIENTS is multiplied with."""
        num_requests = self.num_decodes + len(self.prefills)
        line = [1.0, 0.0, 0.0, 0.0] if on_floor else [0.0, 1.0, self.num_new, num_requests]
        sequences = sum(length for _, length in self.prefills)
        return [
            *line,
            1.0 if self.prefills else 0.0,
            self.context + sequences,
            sequences,
            sum(new_len * length for new_len, length in self.prefills),
            sum(length * length for _, length in self.prefills),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured point: iterations that followed one another, and how long the engine took for them.

    `kind` is the class whose error is told. `ttft_s`: the time to first token, where one request ran alone.
    """

    kind: str
    iterations: tuple[Iteration, ...]
    engine_s: float
    ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative errors of the samples of one kind, as shares of what was measured."""

    num_samples: int
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The costs that explain the samples, and how well they do."""

    step: StepCost
    overhead_s: float
    samples: tuple[Sample, ...]

    def predict(self, sample: Sample) -> tuple[float, float]:
        """Return the measured and the predicted seconds: of the TTFT if there is one, else of the engine."""
        engine_s = _seconds(self.step, sample)
        return (
            (sample.engine_s, engine_s)
            if sample.ttft_s is None
            else (sample.ttft_s, self.overhead_s + engine_s)
        )

    def errors(self) -> dict[str, FitError]:
        """Return the error of each kind, in the order of the samples."""
        shares: dict[str, list[float]] = {}
        for sample in self.samples:
            measured_s, predicted_s = self.predict(sample)
            shares.setdefault(sample.kind, []).append(abs(predicted_s / measured_s - 1))
        return {kind: FitError(len(found), fmean(found), max(found)) for kind, found in shares.items()}


def prompt_iterations(new_len: int, cached_len: int, chunk_tokens: int) -> tuple[Iteration, ...]:
    """Return the iterations of one prompt alone, which is prefilled in chunks."""
    ends = [*range(chunk_tokens, new_len, chunk_tokens), new_len]
    starts = [0, *ends[:-1]]
    return tuple(
        Iteration(prefills=((end - start, cached_len + end),))
        for start, end in zip(starts, ends, strict=True)
    )


def fit_costs(samples: Sequence[Sample]) -> Fit:
    """Return the costs that explain the samples best.

    What a request waits outside the engine is TTFT - engine time, as the constant with the least sum of
    relative errors. Where no floor shows, it is the shortest iteration of the line. Raises InputError for
    fewer samples than coefficients.
    """
    if len(samples) < len(COEFFICIENTS):
        raise InputError(
            f"{len(samples)} measured points cannot give {len(COEFFICIENTS)} coefficients: "
            "measure more, on a server with more room"
        )
    steps = [_fit_with_floor(samples, below) for below in _borders(samples)]
    step = min(steps, key=lambda candidate: _misfit(candidate, samples))
    return Fit(step, _overhead(samples), tuple(samples))


def _overhead(samples: Sequence[Sample]) -> float:
    """Return the median of TTFT - engine time, each weighed by 1 / TTFT; 0 without any."""
    waits = sorted((one.ttft_s - one.engine_s, 1 / one.ttft_s) for one in samples if one.ttft_s is not None)
    half = sum(weight for _, weight in waits) / 2
    for wait_s, weight in waits:
        half -= weight
        if half <= 0:
            return max(0.0, wait_s)
    return 0.0


def _borders(samples: Sequence[Sample]) -> list[int]:
    """Return the numbers of new tokens below which an iteration may be on the floor."""
    return sorted({0} | {one.num_new for sample in samples for one in sample.iterations})


def _fit_with_floor(samples: Sequence[Sample], below: int) -> StepCost:
    """Return the best costs if exactly the iterations of fewer than `below` new tokens are on the floor."""
    rows = [_row(sample, below) for sample in samples]
    values: dict[str, Any] = dict(
        zip(COEFFICIENTS, nonnegative_least_squares(rows, [1.0] * len(rows)), strict=True)
    )
    shortest_s = sum(values[name] for name in LINE)
    return StepCost(**values | {"floor_s": values["floor_s"] if below else shortest_s})


def _row(sample: Sample, below: int) -> Row:
    """Return the sample's features as shares of its time, so that a perfect fit gives 1."""
    each = [one.features(on_floor=one.num_new < below) for one in sample.iterations]
    return [sum(column) / sample.engine_s for column in zip(*each, strict=True)]


def _misfit(step: StepCost, samples: Sequence[Sample]) -> float:
    return sum((_seconds(step, sample) / sample.engine_s - 1) ** 2 for sample in samples)


def _seconds(step: StepCost, sample: Sample) -> float:
    return sum(step.seconds(one.prefills, one.num_decodes, one.context) for one in sample.iterations)


def nonnegative_least_squares(rows: Sequence[Row], targets: Row) -> Row:
    """Return x >= 0 with the least sum of (row · x - target)². O(2^columns · columns³)."""
    scales = [sum(row[i] ** 2 for row in rows) ** 0.5 or 1.0 for i in range(len(rows[0]))]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    columns = list(zip(*scaled, strict=True))
    gram = [[_dot(a, b) for b in columns] for a in columns]
    moments = [_dot(column, targets) for column in columns]
    best, best_gain = [0.0] * len(columns), 0.0
    for subset, solution in _subset_solutions(gram, moments):
        gain = sum(moments[i] * value for i, value in zip(subset, solution, strict=True))
        if gain > best_gain:
            best_gain = gain
            best = [0.0] * len(columns)
            for i, value in zip(subset, solution, strict=True):
                best[i] = value / scales[i]
    return best


def _subset_solutions(gram: list[Row], moments: Row) -> Iterator[tuple[tuple[int, ...], Row]]:
    """Yield every subset of the columns whose own least-squares solution has nothing below zero."""
    used = [i for i in range(len(moments)) if gram[i][i]]
    for size in range(1, len(used) + 1):
        for subset in combinations(used, size):
            solution = _solve([[*(gram[i][j] for j in subset), moments[i]] for i in subset])
            if solution and min(solution) >= 0:
                yield subset, solution


def _solve(rows: list[Row]) -> Row | None:
    """Return the solution of symmetric positive equations, right sides last; None if singular."""
    size = len(rows)
    for i in range(size):
        if rows[i][i] < SINGULAR:
            return None
        for j in range(i + 1, size):
            share = rows[j][i] / rows[i][i]
            rows[j] = [a - share * b for a, b in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        solution[i] = (rows[i][size] - _dot(rows[i][i + 1 : size], solution[i + 1 :])) / rows[i][i]
    return solution


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
