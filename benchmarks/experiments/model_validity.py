"""How far the engine model can be trusted: against a real runtime, and against its emulation.

    python -m benchmarks.experiments.model_validity [--quick] [--rounds 3] [--out FILE]

Requests whose shape is known: eight prefixes of about 600 random tokens, 20 to 200 tokens of their own, 8 to
48 tokens of output, Poisson arrivals that wait for nothing. Every round begins with a cache flush; figures
are medians over rounds. Two comparisons:

*CPU*: one real SGLang runtime with a tiny model on this machine, measured, against the profile that was
calibrated on such a machine, simulated. Part of the error is the machine's, which may be faster or slower
than it was then: the load "alone", one request after the other, shows how much, and whatever the error is
more or less under load is the model's. The loads take turns.

*Emulated*: two emulated runtimes of `h100-llama3-8b` over HTTP against the same two simulated. Both run the
same engine model, so they have to agree: within AGREEMENT in mean latency, or the exit status is 1. Neither
is a measurement of a GPU.

A request that is lost, or answered at another length than asked for, is an error. `late_s`: how late, at
most, this process sent a request; it and the lateness that an emulated runtime counts are large if the
machine was busy. `--quick`: fewer requests, one round; it writes nothing unless --out says where.
"""

import asyncio
import platform
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import aiohttp
import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.commands.emulate import Emulated
from preble_sgl.core import (
    ProgramId,
    Request,
    RequestRecord,
    SamplingParams,
    WorkerId,
    new_request_id,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.fleet import Fleet
from preble_sgl.profiles import load_profile
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtime
from preble_sgl.runtime_ext.model_files import vocab_size
from preble_sgl.runtime_ext.protocol import Runtime
from preble_sgl.runtime_ext.tiny_model import SPECIAL_TOKENS, ensure_tiny_model
from preble_sgl.sim.arrivals import poisson
from preble_sgl.sim.points import Setting, simulate
from preble_sgl.sim.report import summarise
from preble_sgl.sim.workloads import Session, Turn

RESULT = Path("benchmarks/results/model_validity")
CPU = Setting(policy="round_robin", gpus=1, profile=load_profile("cpu-tiny"))
CPU_LOADS = {"alone": None, "low": 4.0, "middle": 16.0}
"""Requests per second; None for one after the other."""

GPU = Setting(policy="preble_e2", gpus=2, profile=load_profile("h100-llama3-8b"))
GPU_RATE = 30.0
LONG_S = 10.0
"""Far longer than a request takes by itself."""

AGREEMENT = 0.1

NUM_REQUESTS, QUICK_REQUESTS, WARM_UP_REQUESTS = 120, 40, 16
NUM_PREFIXES = 8
PREFIX_LEN, OWN_LEN, OUTPUT_LEN = (540, 660), (20, 200), (8, 48)

Figures = dict[str, float]
"""What is compared: seconds, and tokens."""

SHOWN = {
    "mean_s": "mean latency, s",
    "p99_s": "p99 latency, s",
    "ttft_s": "mean TTFT, s",
    "cached_tokens": "cached tokens",
}


@dataclass(frozen=True, slots=True)
class Load:
    """Sessions of one request each, and when they arrive, in seconds after the start.

    `waits`: one arrives when the one before is done; `arrivals` are then far enough apart for that.
    """

    sessions: Sequence[Session]
    arrivals: Sequence[float]
    waits: bool = False

    @classmethod
    def make(cls, num_requests: int, rate: float | None, num_ids: int) -> "Load":
        """Draw it; only the arrivals depend on `rate`, None for one after the other."""
        rng = random.Random(0)

        def tokens(bounds: tuple[int, int]) -> list[int]:
            return rng.choices(range(len(SPECIAL_TOKENS), num_ids), k=rng.randint(*bounds))

        prefixes = [tokens(PREFIX_LEN) for _ in range(NUM_PREFIXES)]
        groups = rng.choices(range(NUM_PREFIXES), k=num_requests)
        turns = [
            Turn(token_ids(prefixes[group] + tokens(OWN_LEN)), token_ids(tokens(OUTPUT_LEN)))
            for group in groups
        ]
        sessions = [Session((turn,), group) for turn, group in zip(turns, groups, strict=True)]
        if rate is None:
            return cls(sessions, [number * LONG_S for number in range(num_requests)], waits=True)
        return cls(sessions, list(islice(poisson(rate, random.Random(1)), num_requests)))

    def first(self, num_requests: int) -> "Load":
        """Return its beginning."""
        return Load(self.sessions[:num_requests], self.arrivals[:num_requests])

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(len(session.turns[0].new) for session in self.sessions)


def simulated(setting: Setting, load: Load) -> Figures:
    """Return what the engine model says. Deterministic."""
    num = len(load.sessions)
    summary = simulate(setting, iter(load.sessions), iter(load.arrivals), num_requests=num)
    assert (summary.finished, summary.failed) == (num, 0), summary
    return {
        "mean_s": summary.mean_e2e_s,
        "p99_s": summary.p99_e2e_s,
        "ttft_s": summary.mean_ttft_s,
        "cached_tokens": round(summary.hit_rate * load.prompt_tokens),
    }


# The same load on runtimes that answer


class Bench:
    """Runtimes, each round behind a scheduler that knows nothing yet."""

    def __init__(self, runtimes: Sequence[Runtime], setting: Setting, model: Path) -> None:
        self._runtimes = runtimes
        self._setting = setting
        self._chat = ChatFormat.load(model)

    async def run(self, load: Load) -> Figures:
        """Send a load, each request when it arrives, and return what came of it."""
        records: list[RequestRecord] = []
        fleet = Fleet(
            self._runtimes,
            chat=self._chat,
            profile=self._setting.profile.cost,
            policy=self._setting.policy,
            on_record=records.append,
        )
        await fleet.flush_cache()
        late_s = await (_send_one_by_one(fleet, load) if load.waits else _send(fleet, load))
        return _figures(records, len(load.sessions)) | {"late_s": late_s}


async def _send(fleet: Fleet, load: Load) -> float:
    """Send each request when it arrives, wait for all, and return by how much one was late at most."""
    loop = asyncio.get_running_loop()
    started_at, late_s = loop.time(), 0.0
    async with asyncio.TaskGroup() as group:
        for session, arrival in zip(load.sessions, load.arrivals, strict=True):
            await asyncio.sleep(started_at + arrival - loop.time())
            late_s = max(late_s, loop.time() - started_at - arrival)
            group.create_task(_ask(fleet, session.turns[0]))
    return late_s


async def _send_one_by_one(fleet: Fleet, load: Load) -> float:
    for session in load.sessions:
        await _ask(fleet, session.turns[0])
    return 0.0


async def _ask(fleet: Fleet, turn: Turn) -> None:
    """Make one call. Raises whatever the runtime does, and RuntimeError for an answer of another length."""
    request_id = new_request_id()
    request = Request(
        request_id=request_id,
        program_id=ProgramId(request_id),
        call_path="turn0",
        prompt=turn.new,
        sampling=SamplingParams(max_new_tokens=len(turn.output), ignore_eos=True),
    )
    usage = (await fleet.generate(request)).usage
    if (usage.prompt_tokens, usage.output_tokens) != (len(turn.new), len(turn.output)):
        raise RuntimeError(f"asked for {len(turn.output)} tokens after {len(turn.new)}, got {usage}")


def _figures(records: Sequence[RequestRecord], num_requests: int) -> Figures:
    if len(records) != num_requests:
        raise RuntimeError(f"{num_requests - len(records)} of {num_requests} requests were lost")
    summary = summarise(records, 0, {})
    return {
        "mean_s": summary.mean_e2e_s,
        "p99_s": summary.p99_e2e_s,
        "ttft_s": summary.mean_ttft_s,
        "cached_tokens": sum(record.usage.cached_tokens for record in records),
    }


async def measure_cpu(num_requests: int, num_rounds: int) -> list[dict[str, Any]]:
    """Compare a real runtime with its profile; return one row per load."""
    model = ensure_tiny_model()
    spec = LaunchSpec(model_path=model, worker_id=WorkerId("cpu0"), kv_tokens=CPU.profile.kv_tokens)
    loads = {name: Load.make(num_requests, rate, _num_ids(model)) for name, rate in CPU_LOADS.items()}
    rounds: dict[str, list[Figures]] = {name: [] for name in loads}
    async with launch_runtime(spec) as runtime:
        bench = Bench([runtime], CPU, model)
        await bench.run(loads["middle"].first(WARM_UP_REQUESTS))
        for _ in range(num_rounds):
            for name, load in loads.items():
                rounds[name].append(await bench.run(load))
    return [
        {"load": name, "rate": CPU_LOADS[name]} | compared("measured", rounds[name], simulated(CPU, load))
        for name, load in loads.items()
    ]


async def measure_emulated(num_requests: int, num_rounds: int) -> dict[str, Any]:
    """Compare emulated runtimes with simulated ones."""
    model = ensure_tiny_model()
    emulated = Emulated.checked(GPU.profile.name, runtimes=GPU.gpus, model_path=model, order=GPU.order)
    load = Load.make(num_requests, GPU_RATE, _num_ids(model))
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(emulated_runtime(emulated.config(p))) for p in emulated.ports]
        runtimes = [
            await stack.enter_async_context(SglangRuntime.attach(url, worker_id=WorkerId(f"gpu{i:03d}")))
            for i, url in enumerate(urls)
        ]
        bench = Bench(runtimes, GPU, model)
        figures = [await bench.run(load) for _ in range(num_rounds)]
        lateness = [await _lateness(url) for url in urls]
    row = compared("emulated", figures, simulated(GPU, load))
    ratio = row["emulated"]["mean_s"]["median"] / row["simulated"]["mean_s"]
    return {
        "policy": GPU.policy,
        "rate": GPU_RATE,
        **row,
        "mean_latency_ratio": round(ratio, 4),
        "agrees": abs(ratio - 1) <= AGREEMENT,
        "runtimes": lateness,
    }


def _num_ids(model: Path) -> int:
    num_ids = vocab_size(str(model))
    assert num_ids is not None, "we have written this model ourselves"
    return num_ids


async def _lateness(url: str) -> dict[str, float]:
    """Return how well an emulated runtime kept up with its clock."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/server_info") as response:
        emulated = orjson.loads(await response.read())["emulated"]
    return {name: emulated[name] for name in ("iterations", "mean_lateness_s", "max_lateness_s")}


# Showing it


def compared(name: str, rounds: Sequence[Figures], model: Figures) -> dict[str, Any]:
    """Return the rounds in short, what the model says, and how far it is off from their median."""
    spreads = {key: _spread([figures[key] for figures in rounds]) for key in rounds[0]}
    errors = {key: model[key] / spreads[key]["median"] - 1 for key in SHOWN}
    return {
        name: spreads,
        "simulated": {key: _rounded(value) for key, value in model.items()},
        "relative_error": {key: round(error, 4) for key, error in errors.items()},
    }


def _spread(values: Sequence[float]) -> Figures:
    return {"median": _rounded(median(values)), "min": _rounded(min(values)), "max": _rounded(max(values))}


def _rounded(value: float) -> float:
    return round(value, 5)


def table(title: str, name: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Return rows, by their loads, with what was found beside what was simulated."""
    shown = Table(title=title)
    for column in ("load", "", name, "range", "simulated", "error"):
        shown.add_column(column, no_wrap=True)
    for load, row in rows.items():
        shown.add_row(load)
        for key, label in SHOWN.items():
            found, error = row[name][key], row["relative_error"][key]
            figures = (found["median"], found["min"], found["max"], row["simulated"][key])
            middle, least, most, model = (f"{figure:.{0 if figure >= 1000 else 3}f}" for figure in figures)
            shown.add_row("", label, middle, f"{least}–{most}", model, f"{error:+.1%}")
        shown.add_section()
    return shown


def show(cpu: list[dict[str, Any]], emulated: dict[str, Any]) -> None:
    """Print both comparisons."""
    console = Console(soft_wrap=True)
    loads = {row["load"] + (f" {row['rate']:g}/s" if row["rate"] else ""): row for row in cpu}
    console.print(table("one real CPU runtime: measured, and simulated by its profile", "measured", loads))
    late_s = max(row["measured"]["late_s"]["max"] for row in cpu)
    console.print(f"requests were sent at most {late_s * 1000:.1f} ms late")
    title = f"{GPU.gpus} runtimes of {GPU.profile.name}, emulated and simulated"
    console.print(table(title, "emulated", {f"{GPU_RATE:g}/s": emulated}))
    for number, one in enumerate(emulated["runtimes"]):
        mean_ms, max_ms = one["mean_lateness_s"] * 1000, one["max_lateness_s"] * 1000
        console.print(
            f"emulated runtime {number}: {one['iterations']} iterations, "
            f"late by {mean_ms:.2f} ms in the mean, {max_ms:.1f} ms at most"
        )
    ratio, verdict = emulated["mean_latency_ratio"], "agree" if emulated["agrees"] else "DISAGREE"
    console.print(f"mean latency, emulated over simulated: {ratio:.3f}: they {verdict}")


def main(
    quick: Annotated[bool, typer.Option(help="Fewer requests, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Where the .json goes.")] = None,
) -> None:
    """Measure, print and keep the result."""
    num_requests, rounds = (QUICK_REQUESTS, 1) if quick else (NUM_REQUESTS, rounds)
    cpu = asyncio.run(measure_cpu(num_requests, rounds))
    emulated = asyncio.run(measure_emulated(num_requests, rounds))
    show(cpu, emulated)
    result = {
        "cpu": cpu,
        "emulated": emulated,
        "requests": num_requests,
        "rounds": rounds,
        "profiles": {"cpu": CPU.profile.name, "emulated": GPU.profile.name},
        "machine": f"{platform.machine()}, Python {platform.python_version()}, SGLang 0.5.23 on the CPU",
        "command": "python -m benchmarks.experiments.model_validity"
        + (" --quick" if quick else f" --rounds {rounds}"),
    }
    if path := out or (None if quick else RESULT):
        path.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(result).decode())
    if not emulated["agrees"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
