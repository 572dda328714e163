"""What the plugin costs inside a real SGLang runtime on a CPU: with it and without it, in turn.

    python -m benchmarks.experiments.plugin_overhead [--rounds 12] [--out FILE]

Three runtimes of one model: stock, with the plugin in SGLang's own order (it then only publishes cache events
at once and looks for hints), and with the plugin's order `preble_groups`. All publish cache events. Every
round runs each load on each runtime alone, in rotating order, after a cache flush:

- *decode*: 32 requests of 20 prompt tokens that generate 100 tokens each;
- *prefill*: 120 requests over eight documents of 400 tokens that generate 4 tokens each.

Given is wall time, as a ratio to stock in the same round. The model is tiny, so a step takes a few
milliseconds here; what the plugin adds to each is the same on a GPU.
"""

import asyncio
import platform
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.requests import request
from preble_sgl.core import Request, WorkerId
from preble_sgl.machine import default_model
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes

RESULT = Path("benchmarks/results/plugin_overhead")
LOADS = ("decode", "prefill")


def requests(load: str, seed: int) -> list[Request]:
    """Return what one round asks of a runtime."""
    rng = random.Random(f"{load} {seed}")
    if load == "decode":
        return [request(_tokens(rng, 20), 100) for _ in range(32)]
    documents = [_tokens(rng, 400) for _ in range(8)]
    return [request([*rng.choice(documents), *_tokens(rng, 20)], 4) for _ in range(120)]


async def answered(runtime: SglangRuntime, asked: Sequence[Request]) -> tuple[float, int]:
    """Return how long a runtime takes for requests that all come at once, and the tokens it prefills."""

    async def one(one_asked: Request) -> int:
        return [chunk.usage.computed_tokens async for chunk in runtime.stream(one_asked)][-1]

    await runtime.flush_cache()
    started_at = perf_counter()
    computed = await asyncio.gather(*(one(one_asked) for one_asked in asked))
    return perf_counter() - started_at, sum(computed)


async def measure(rounds: int) -> dict[str, dict[str, list[tuple[float, int]]]]:
    """Return the seconds and prefilled tokens of each round, by load and runtime."""
    model = default_model()
    specs = [
        LaunchSpec(model_path=model, worker_id=WorkerId("stock"), plugin=False),
        LaunchSpec(model_path=model, worker_id=WorkerId("plugin")),
        LaunchSpec(model_path=model, worker_id=WorkerId("plugin, preble_groups"), order="preble_groups"),
    ]
    measured: dict[str, dict[str, list[tuple[float, int]]]] = {load: defaultdict(list) for load in LOADS}
    async with launch_runtimes(specs) as runtimes:
        for number in range(-1, rounds):  # the first is not counted
            turn = number % len(runtimes)
            for load in LOADS:
                for runtime in runtimes[turn:] + runtimes[:turn]:
                    took = await answered(runtime, requests(load, number))
                    if number >= 0:
                        measured[load][runtime.info.worker_id].append(took)
    return measured


def ratios(measured: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    """Return each runtime's median seconds and its ratio to stock round by round, with quartiles."""
    found = {}
    for name, values in measured.items():
        each = sorted(a / b for (a, _), (b, _) in zip(values, measured["stock"], strict=True))
        quarter = len(each) // 4
        found[name] = {
            "median_s": median(took_s for took_s, _ in values),
            "median_computed_tokens": median(computed for _, computed in values),
            "ratio": median(each),
            "quartiles": [each[quarter], each[-1 - quarter]],
        }
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    measured = asyncio.run(measure(rounds))
    found = {load: ratios(values) for load, values in measured.items()}
    table = Table(title=f"SGLang on a CPU with the plugin ÷ stock, {rounds} rounds")
    for column in ("load", "runtime", "median seconds", "ratio (quartiles)", "tokens prefilled"):
        table.add_column(column)
    for load, by_runtime in found.items():
        for name, one in by_runtime.items():
            low, high = one["quartiles"]
            ratio = f"{one['ratio']:.3f} ({low:.3f}–{high:.3f})"
            computed = f"{one['median_computed_tokens']:,.0f}"
            table.add_row(load, name, f"{one['median_s']:.2f}", ratio, computed)
    Console(width=110).print(table)
    result = {
        "ratios": found,
        "seconds_and_computed_tokens": measured,
        "rounds": rounds,
        "machine": f"2 cores, {platform.machine()}, Python {platform.python_version()}, SGLang on CPU",
        "command": f"python -m benchmarks.experiments.plugin_overhead --rounds {rounds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(found).decode())


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, 2000) for _ in range(length)]


if __name__ == "__main__":
    typer.run(main)
