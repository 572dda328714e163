"""What Prometheus reads, under the names of the field, per worker and tenant."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from preble_sgl.core import RequestRecord
from preble_sgl.global_sched.snapshot import SchedulerSnapshot
from preble_sgl.server.admission import Admission

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
WHOSE = ("worker", "tenant")
PER_WORKER = {
    "num_prefill": "prefill_requests",
    "num_decode": "decode_requests",
    "used_tokens": "kv_used_tokens",
    "kv_tokens": "kv_tokens",
}


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ttft = self._seconds("time_to_first_token_seconds", "From arrival to a stream's first token.")
        self.e2e = self._seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queue = self._seconds("queue_time_seconds", "From arrival until it was placed.")
        self.tpot = self._seconds(
            "time_per_output_token_seconds", "Mean gap of a stream's tokens.", PER_TOKEN
        )
        self.prompt = self._counter("prompt_tokens_total", "Tokens of prompts.", *WHOSE)
        self.cached = self._counter("cached_tokens_total", "Of those, found in a cache.", *WHOSE)
        self.computed = self._counter("computed_tokens_total", "Of those, computed.", *WHOSE)
        self.output = self._counter("generation_tokens_total", "Generated tokens.", *WHOSE)
        self._known: dict[tuple[str, str], _Of] = {}
        self._placements = self._counter("placements_total", "Placements.", "worker", "reason")
        self._answers = self._counter("http_requests_total", "Answers.", "path", "status", "tenant")
        self._running = self._gauge("num_running_reqs", "Requests under way.")
        self._waiting = self._gauge("num_queue_reqs", "Requests that wait for a turn or a worker.")
        self._programs = self._gauge("num_open_programs", "Program runs that have a worker.")
        self._workers = {
            field: self._gauge(f"worker_{name}", f"{name} of a worker.", "worker")
            for field, name in PER_WORKER.items()
        }

    def on_record(self, record: RequestRecord) -> None:
        """Count a request that ended well."""
        whose = (record.worker_id, record.tenant)
        of = self._known.get(whose) or self._known.setdefault(whose, _Of(self, whose))
        of.e2e.observe(record.finished_at - record.submitted_at)
        of.queue.observe(record.placed_at - record.submitted_at)
        usage, decode_s = record.usage, record.finished_at - record.first_token_at
        if decode_s:  # of an answer that came as a whole nobody saw the first token
            of.ttft.observe(record.first_token_at - record.submitted_at)
        if decode_s and usage.output_tokens > 1:
            of.tpot.observe(decode_s / (usage.output_tokens - 1))
        of.prompt.inc(usage.prompt_tokens)
        of.cached.inc(usage.cached_tokens)
        of.computed.inc(usage.computed_tokens)
        of.output.inc(usage.output_tokens)
        self._placements.labels(record.worker_id, record.placement.reason).inc()

    def on_answer(self, path: str, status: int, tenant: str) -> None:
        """Count an answer, whatever it was."""
        self._answers.labels(path, status, tenant).inc()

    def text(self, snapshot: SchedulerSnapshot, admission: Admission) -> bytes:
        """Return everything in Prometheus' text format."""
        self._running.set(admission.num_running)
        self._waiting.set(admission.num_waiting + snapshot.num_queued + snapshot.num_held)
        self._programs.set(snapshot.num_open_programs)
        for field, gauge in self._workers.items():
            gauge.clear()
            for worker in snapshot.workers:
                gauge.labels(worker.worker_id).set(getattr(worker, field))
        return generate_latest(self.registry)

    def _seconds(self, name: str, told: str, buckets: Iterable[float] = SECONDS) -> Histogram:
        return Histogram(f"preble_{name}", told, WHOSE, buckets=tuple(buckets), registry=self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"preble_{name}", told, labels, registry=self.registry)

    def _gauge(self, name: str, told: str, *labels: str) -> Gauge:
        return Gauge(f"preble_{name}", told, labels, registry=self.registry)


class _Of:
    """The series of one worker and tenant: looking them up by labels costs more than counting."""

    __slots__ = ("cached", "computed", "e2e", "output", "prompt", "queue", "tpot", "ttft")

    def __init__(self, metrics: Metrics, whose: tuple[str, str]) -> None:
        self.ttft = metrics.ttft.labels(*whose)
        self.e2e = metrics.e2e.labels(*whose)
        self.queue = metrics.queue.labels(*whose)
        self.tpot = metrics.tpot.labels(*whose)
        self.prompt = metrics.prompt.labels(*whose)
        self.cached = metrics.cached.labels(*whose)
        self.computed = metrics.computed.labels(*whose)
        self.output = metrics.output.labels(*whose)
