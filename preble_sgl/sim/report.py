"""What came of a run: one point of a table or plot, from the records of its requests."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from preble_sgl.core import ProgramId, RequestRecord, Usage, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The aggregate of a run. Seconds are mean or percentile over requests or programs that finished.

    `hit_rate`: cached share of the prompt tokens. `imbalance`: computing time of the busiest worker over the
    mean. `failed`: requests that a runtime refused. `makespan_s`: from the first submission to the last end.
    """

    finished: int
    failed: int
    mean_e2e_s: float
    p50_e2e_s: float
    p99_e2e_s: float
    mean_ttft_s: float
    p99_ttft_s: float
    mean_tpot_s: float
    mean_program_s: float
    p99_program_s: float
    makespan_s: float
    hit_rate: float
    imbalance: float


def summarise(records: Sequence[RequestRecord], num_failed: int, busy_s: Mapping[WorkerId, float]) -> Summary:
    """Return the aggregate of what finished. O(n log n)."""
    e2e = sorted(record.finished_at - record.submitted_at for record in records)
    ttft = sorted(record.first_token_at - record.submitted_at for record in records)
    programs = sorted(program_latencies(records))
    usage = sum((record.usage for record in records), Usage())
    began_at = min((record.submitted_at for record in records), default=0.0)
    ended_at = max((record.finished_at for record in records), default=0.0)
    return Summary(
        finished=len(records),
        failed=num_failed,
        mean_e2e_s=_mean(e2e),
        p50_e2e_s=percentile(e2e, 0.5),
        p99_e2e_s=percentile(e2e, 0.99),
        mean_ttft_s=_mean(ttft),
        p99_ttft_s=percentile(ttft, 0.99),
        mean_tpot_s=_mean([tpot_s(record) for record in records if record.usage.output_tokens > 1]),
        mean_program_s=_mean(programs),
        p99_program_s=percentile(programs, 0.99),
        makespan_s=ended_at - began_at,
        hit_rate=usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0,
        imbalance=max(busy_s.values()) / _mean(list(busy_s.values())) if any(busy_s.values()) else 1.0,
    )


def program_latencies(records: Sequence[RequestRecord]) -> list[float]:
    """Return each program run's time from its first submission to its last end, in seconds."""
    began: dict[ProgramId, float] = defaultdict(lambda: float("inf"))
    ended: dict[ProgramId, float] = defaultdict(float)
    for record in records:
        began[record.program_id] = min(began[record.program_id], record.submitted_at)
        ended[record.program_id] = max(ended[record.program_id], record.finished_at)
    return [ended[program_id] - began_at for program_id, began_at in began.items()]


def tpot_s(record: RequestRecord) -> float:
    """Return seconds per output token after the first; there must be two or more."""
    return (record.finished_at - record.first_token_at) / (record.usage.output_tokens - 1)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the least value that at least a `share` of the ordered values does not exceed; 0 for none."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
