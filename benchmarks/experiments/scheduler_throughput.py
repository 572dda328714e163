"""How many requests per second the global scheduler can place, on one core.

    python -m benchmarks.experiments.scheduler_throughput [--quick] [--out FILE]

One cycle: submit, dispatch, first token, dispatch, finish, dispatch. Eight requests per worker are in flight,
two of them in prefill. The tree is filled to the wanted size first, with short prompts that differ at once.
Each figure is the median of several runs of CYCLES cycles (fewer on small trees, which would not stay small,
and for `preble_literal`, whose decisions scan its whole history); the policies take turns.
`bytes_per_token`: growth of this process per token that the tree holds, for a tree of real prompts on
one worker. The garbage collector is set as `preble-sgl` sets it.
"""

import gc
import os
import platform
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import orjson
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, TokenIds, WorkerId, token_ids
from preble_sgl.global_sched import POLICIES, GlobalScheduler, make_scheduler
from preble_sgl.profiles import load_profile
from preble_sgl.sim.popularity import Ranked
from preble_sgl.sim.workloads import Workload, toolbench, videoqa

RESULT = Path("benchmarks/results/scheduler_throughput")
IN_FLIGHT = 8
PREFILLING = 2
CYCLES = 2000
SLOW = "preble_literal"
SLOW_CYCLES = 100
SLOW_NODES = 2000
KV_TOKENS = 100_000_000
SPACING_S = 0.01
PROFILE = load_profile("a6000-mistral-7b").cost
WORKLOADS: dict[str, Workload] = {
    "toolbench": toolbench(popularity=Ranked(400, zipf=1.1)),
    "videoqa": videoqa(),
}

Prompts = Iterator[tuple[TokenIds, int]]
"""Prompts without end, each with the length of its output."""


def single_turns(workload: str, rng: random.Random) -> Prompts:
    """Yield the prompts of a workload whose sessions have one turn each."""
    for session in WORKLOADS[workload].sessions(rng):
        (turn,) = session.turns
        yield turn.new, len(turn.output)


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure."""

    policy: str
    workload: str
    workers: int
    tree_nodes: int
    cycles_per_s: float
    cycles_per_s_min: float
    cycles_per_s_max: float


class Bench:
    """A scheduler under a steady stream of requests."""

    def __init__(self, policy: str, num_workers: int) -> None:
        self.scheduler: GlobalScheduler = make_scheduler(policy, rng=random.Random(0))
        self.num_workers = num_workers
        self.now = 0.0
        self._number = 0
        self._prefilling: deque[RequestId] = deque()
        self._decoding: deque[RequestId] = deque()
        self._outputs: dict[RequestId, TokenIds] = {}
        self._matched: dict[RequestId, int] = {}
        for i in range(num_workers):
            self.scheduler.on_worker_up(WorkerId(f"w{i:02d}"), kv_tokens=KV_TOKENS, profile=PROFILE, now=0.0)

    def fill(self, num_nodes: int, rng: random.Random) -> None:
        """Grow the tree to `num_nodes` nodes with prompts of 16 tokens."""
        while self.scheduler.snapshot().num_nodes < num_nodes:
            for _ in range(min(200, num_nodes)):
                self._cycle(token_ids(rng.choices(range(1_000_000), k=16)), token_ids([1, 2]))

    def run(self, requests: list[tuple[Request, TokenIds]]) -> float:
        """Put ready-made requests through and return the cycles per second."""
        started_at = time.perf_counter()
        for request, output in requests:
            self._step(request, output)
        return len(requests) / (time.perf_counter() - started_at)

    def requests(self, prompts: Prompts, num: int) -> list[tuple[Request, TokenIds]]:
        """Make requests before the clock runs: a caller has them anyway."""
        taken = [next(prompts) for _ in range(num)]
        return [(self._request(prompt, length), token_ids(range(length))) for prompt, length in taken]

    def _cycle(self, prompt: TokenIds, output: TokenIds) -> None:
        self._step(self._request(prompt, len(output)), output)

    def _request(self, prompt: TokenIds, output_len: int) -> Request:
        self._number += 1
        return Request(
            request_id=RequestId(f"{self._number:032x}"),
            program_id=ProgramId(f"{self._number}"),
            call_path="call",
            prompt=prompt,
            sampling=SamplingParams(max_new_tokens=output_len),
        )

    def _step(self, request: Request, output: TokenIds) -> None:
        self.now += SPACING_S
        self._outputs[request.request_id] = output
        self.scheduler.submit(request, self.now)
        self._start()
        while len(self._prefilling) > PREFILLING * self.num_workers:
            request_id = self._prefilling.popleft()
            self.scheduler.on_first_token(request_id, self.now)
            self._decoding.append(request_id)
            self._start()
        while len(self._outputs) > IN_FLIGHT * self.num_workers:
            request_id = (self._decoding or self._prefilling).popleft()
            output = self._outputs.pop(request_id)
            cached_tokens = self._matched.pop(request_id)
            self.scheduler.on_finish(request_id, output=output, cached_tokens=cached_tokens, now=self.now)
            self._start()

    def _start(self) -> None:
        for placement in self.scheduler.dispatch(self.now):
            self._prefilling.append(placement.request_id)
            self._matched[placement.request_id] = placement.matched_len


def measure(policies: list[str], workload: str, workers: int, nodes: int, rounds: int) -> list[Row]:
    """Measure policies in turns, each on a tree of its own."""
    benches = {policy: Bench(policy, workers) for policy in policies}
    rng = random.Random(1)
    for policy, bench in benches.items():
        bench.fill(min(nodes, SLOW_NODES) if policy == SLOW else nodes, random.Random(2))
    prompts = single_turns(workload, rng)
    rates: dict[str, list[float]] = {policy: [] for policy in policies}
    for _ in range(rounds):
        for policy, bench in benches.items():
            requests = bench.requests(prompts, _num_cycles(policy, nodes))
            gc.collect()
            rates[policy].append(bench.run(requests))
    return [
        Row(
            policy,
            workload,
            workers,
            benches[policy].scheduler.snapshot().num_nodes,
            round(median(rates[policy])),
            round(min(rates[policy])),
            round(max(rates[policy])),
        )
        for policy in policies
    ]


def _num_cycles(policy: str, nodes: int) -> int:
    """Return how many cycles to time: few enough not to make a small tree a large one."""
    return SLOW_CYCLES if policy == SLOW else min(CYCLES, max(SLOW_CYCLES, nodes // 10))


def bytes_per_token(workload: str, num_requests: int) -> float:
    """Return the memory that one cached token takes, in a tree of `num_requests` prompts."""
    bench = Bench("preble_plan", 1)
    prompts = single_turns(workload, random.Random(1))
    gc.collect()
    before = _resident_bytes()
    for _ in range(num_requests // 100):
        bench.run(bench.requests(prompts, 100))
    gc.collect()
    (worker,) = bench.scheduler.snapshot().workers
    return (_resident_bytes() - before) / worker.used_tokens


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plan(quick: bool) -> list[tuple[list[str], str, int, int]]:
    """Return what to measure: policies, workload, workers, tree nodes."""
    ours = ["preble_plan", "preble_e2", SLOW]
    cells = [(ours, "toolbench", 16, nodes) for nodes in (10**3, 10**4, *(() if quick else (10**5, 10**6)))]
    if not quick:
        cells += [(ours, "toolbench", workers, 10**4) for workers in (4, 64)]
        cells += [(list(POLICIES), workload, 16, 10**4) for workload in WORKLOADS]
    return cells


def table(rows: list[Row]) -> Table:
    """Return the figures as a table."""
    shown = Table(title="cycles per second on one core (median, range)")
    for column in ("policy", "workload", "workers", "tree nodes", "cycles/s"):
        shown.add_column(column)
    for row in rows:
        spread = f"{row.cycles_per_s:,.0f} ({row.cycles_per_s_min:,.0f}–{row.cycles_per_s_max:,.0f})"
        shown.add_row(row.policy, row.workload, f"{row.workers}", f"{row.tree_nodes:,}", spread)
    return shown


def plot(rows: list[Row], path: Path) -> None:
    """Draw cycles per second over tree size for ToolBench on 16 workers."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    swept = [row for row in rows if row.workload == "toolbench" and row.workers == 16]
    for policy in ("preble_plan", "preble_e2", SLOW):
        points = sorted((row.tree_nodes, row.cycles_per_s) for row in swept if row.policy == policy)
        axis.plot(*zip(*points, strict=True), marker="o", label=policy)
    axis.set(xscale="log", yscale="log", xlabel="nodes in the prefix tree", ylabel="cycles per second")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path)


def main(
    quick: Annotated[bool, typer.Option(help="Two tree sizes, three policies, three rounds.")] = False,
    out: Annotated[Path, typer.Option(help="Where .json and .svg go.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    gc.set_threshold(*GC_THRESHOLDS)
    per_token = {name: bytes_per_token(name, 2000 if quick else 10_000) for name in WORKLOADS}
    rows: list[Row] = []
    for policies, workload, workers, nodes in plan(quick):
        rows += measure(policies, workload, workers, nodes, rounds=3 if quick else 5)
    result = {
        "rows": [asdict(row) | {"bytes_per_token": round(per_token[row.workload], 1)} for row in rows],
        "machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
        "command": "python -m benchmarks.experiments.scheduler_throughput" + " --quick" * quick,
    }
    Console().print(table(rows))
    if not quick:
        out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
        plot(rows, out.with_suffix(".svg"))
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
