"""What a fleet is asked, by name: a workload and its arrivals, or a recorded trace. Small, so it travels."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path

from preble_sgl.errors import InputError
from preble_sgl.sim.arrivals import azure, gamma, poisson, recorded
from preble_sgl.sim.replay import TracedRequest, read_trace
from preble_sgl.sim.workloads import WORKLOADS, Session, Workload, azure_lengths, experiment

MIN_REQUESTS = 200
"""A point has so many requests at least, or its 99th percentile is one of two."""

TRACE_SUFFIXES = (".jsonl", ".json", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sessions that arrive at a rate.

    `workload`: a name of WORKLOADS, `azure_code`, `azure_conv`, or the path of a trace. `rps`: requests per
    second; None for a trace's own. `duration_s`: for how long they arrive, on average. `arrivals`: `poisson`,
    `gamma:CV`, `azure_code` or `azure_conv`; a trace has its own. `scale_gpus`: use the workload at the scale
    of Preble's experiments on so many GPUs, instead of its endless turnover of prefixes. `zipf`,
    `shift_every`: popularity of those prefixes, see `workloads.experiment`.
    """

    workload: str
    rps: float | None
    duration_s: float = 120.0
    arrivals: str = "poisson"
    scale_gpus: int | None = None
    zipf: float | None = None
    shift_every: int | None = None

    def __post_init__(self) -> None:
        if self.rps is not None and not (isfinite(self.rps) and self.rps > 0):
            raise InputError(f"rps={self.rps}: must be above 0")
        if not (isfinite(self.duration_s) and self.duration_s > 0):
            raise InputError(f"duration_s={self.duration_s}: must be above 0")

    @property
    def is_trace(self) -> bool:
        """Whether it is read from a file."""
        return self.workload.endswith(TRACE_SUFFIXES)

    @property
    def num_requests(self) -> int:
        """How many requests there are, or a few more: sessions are not broken off."""
        if self.is_trace:
            return len(_trace(self.workload))
        return max(MIN_REQUESTS, round(self._rate * self.duration_s))

    def play(self, seed: int) -> tuple[Iterator[Session], Iterator[float]]:
        """Return sessions and when they arrive. Equal seeds, equal loads. Raises InputError for bad names."""
        if self.is_trace:
            return self._replay()
        workload = self._workload()
        rng = random.Random(f"arrivals {seed}")
        rate = workload.session_rate(self._rate)
        return workload.sessions(random.Random(f"sessions {seed}")), self._arrivals(rate, rng)

    @property
    def _rate(self) -> float:
        if self.rps is None:
            raise InputError(f"workload {self.workload}: give its requests per second (--rps)")
        return self.rps

    def _replay(self) -> tuple[Iterator[Session], Iterator[float]]:
        trace = _trace(self.workload)
        span_s = trace[-1].at
        stretch = len(trace) / (span_s * self.rps) if self.rps is not None and span_s else 1.0
        return (request.session() for request in trace), recorded((request.at for request in trace), stretch)

    def _workload(self) -> Workload:
        if self.workload == "azure_code":
            return azure_lengths("code")
        if self.workload == "azure_conv":
            return azure_lengths("conv")
        if self.scale_gpus is not None:
            return experiment(self.workload, self.scale_gpus, zipf=self.zipf, shift_every=self.shift_every)
        if self.workload not in WORKLOADS:
            known = ", ".join((*WORKLOADS, "azure_code", "azure_conv"))
            raise InputError(f"no workload {self.workload!r}; there are {known}, and traces (--replay FILE)")
        return WORKLOADS[self.workload]

    def _arrivals(self, rate: float, rng: random.Random) -> Iterator[float]:
        match self.arrivals.split(":"):
            case ["poisson"]:
                return poisson(rate, rng)
            case ["gamma", cv] if _is_number(cv):
                return gamma(rate, float(cv), rng)
            case ["azure_code"]:
                return azure("code", rng, rate)
            case ["azure_conv"]:
                return azure("conv", rng, rate)
        raise InputError(
            f"no arrivals {self.arrivals!r}; there are poisson, gamma:CV, azure_code, azure_conv"
        )


@lru_cache(maxsize=2)
def _trace(path: str) -> list[TracedRequest]:
    return read_trace(Path(path))


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
