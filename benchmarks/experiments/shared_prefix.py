"""Attention that reads a shared prefix once against SGLang's own, in two real runtimes in turn.

    python -m benchmarks.experiments.shared_prefix [--rounds 3] [--out FILE]
    python -m benchmarks.experiments.shared_prefix --gpu 0 --model PATH [--out FILE]

Two runtimes of one model, stock and with `shared_prefix`: on the CPU a small model and a larger one
(weights do not matter for time), on a GPU one that is given; no GPU has run it yet. A group of requests has
one cached prefix and 8 tokens of its own each. Given are decode tokens per second while all of a group
decode, the time to the first token of a request that finds its prefix cached, and what the ratio would be
if a step did nothing but read KV: g (p + o) / (p + g o) for g requests, a prefix of p tokens and o of their
own.
"""

import asyncio
import platform
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.requests import request
from preble_sgl.core import Request, WorkerId
from preble_sgl.machine import default_model
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes

RESULT = Path("benchmarks/results/shared_prefix.json")
GROUPS, OWN = (1, 4, 16, 64), 8
PREFIXES, GPU_PREFIXES = (512, 2048, 4096), (512, 2048, 8192)
FEW, FEW_TIMES = 4, 3
"""Groups of so few decode so many times as many tokens, and so often in a round: they are noisier."""
LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""28 million parameters: more than a toy, and quick enough on two cores."""

Cell = tuple[int, int]
Rounds = dict[str, list[float]]


@contextmanager
def larger_model() -> Iterator[Path]:
    """Yield a directory with the larger model's configuration, for random weights made at load."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        for file in default_model().glob("*.json"):
            shutil.copy(file, directory)
        config = orjson.loads((directory / "config.json").read_bytes())
        (directory / "config.json").write_bytes(orjson.dumps({**config, **LARGER}))
        yield directory


def repeats(size: int) -> int:
    """Return how many times as many tokens a group decodes, and so often in a round."""
    return FEW_TIMES if size <= FEW else 1


async def token_times(runtime: SglangRuntime, asked: Request) -> list[float]:
    """Return when each token came."""
    times: list[float] = []
    async for chunk in runtime.stream(asked):
        times += [perf_counter()] * len(chunk.output_ids)
    return times


async def measure(runtime: SglangRuntime, cell: Cell, num_tokens: int, seed: int) -> tuple[float, float]:
    """Return decode tokens per second of a group, and seconds to the first token of a hit."""
    size, prefix_len = cell
    num_tokens *= repeats(size)
    rng = random.Random(f"{cell} {seed}")
    prefix, *owns = ([rng.randrange(300, 4000) for _ in range(n)] for n in (prefix_len, *[OWN] * (size + 1)))
    await runtime.flush_cache()
    await token_times(runtime, request(prefix, 1))
    began_at = perf_counter()
    (first,) = await token_times(runtime, request(prefix + owns.pop(), 1))
    asked = [request(prefix + own, num_tokens) for own in owns]
    times = await asyncio.gather(*(token_times(runtime, one) for one in asked))
    all_began = max(one[0] for one in times)
    later = [time for one in times for time in one if time > all_began]
    return len(later) / (max(later) - all_began), first - began_at


async def compare(
    how: dict[str, Any], prefixes: tuple[int, ...], num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Return the figures of every group size and prefix length. `how`: settings of both runtimes."""
    specs = [
        LaunchSpec(worker_id=WorkerId("stock"), **how),
        LaunchSpec(worker_id=WorkerId("shared"), shared_prefix=True, **how),
    ]
    cells = [(size, prefix_len) for prefix_len in prefixes for size in GROUPS]
    speed: dict[Cell, Rounds] = {cell: defaultdict(list) for cell in cells}
    ttft: dict[Cell, Rounds] = {cell: defaultdict(list) for cell in cells}
    async with launch_runtimes(specs) as runtimes:
        for runtime in runtimes:
            await measure(runtime, (2, 512), num_tokens, -1)
        for number in range(rounds):
            often = [cell for cell in cells for _ in range(repeats(cell[0]))]
            for i, cell in enumerate(track(often, description=f"round {number + 1}")):
                for runtime in runtimes if (number + i) % 2 else runtimes[::-1]:
                    per_s, first_s = await measure(runtime, cell, num_tokens, number)
                    speed[cell][runtime.info.worker_id].append(per_s)
                    ttft[cell][runtime.info.worker_id].append(first_s)
    return [row(cell, speed[cell], ttft[cell], num_tokens) for cell in cells]


def row(cell: Cell, speed: Rounds, ttft: Rounds, num_tokens: int) -> dict[str, Any]:
    """Return one line of the table; ratios are of the same round, as median and extremes."""
    size, prefix_len = cell
    own = OWN + num_tokens * repeats(size) / 2
    ratios = [ours / stock for ours, stock in zip(speed["shared"], speed["stock"], strict=True)]
    return {
        "group": size,
        "prefix": prefix_len,
        "decode_tokens_per_s": {name: median(values) for name, values in speed.items()},
        "decode_ratio": median(ratios),
        "decode_ratio_spread": [min(ratios), max(ratios)],
        "kv_read_ratio": size * (prefix_len + own) / (prefix_len + size * own),
        "hit_ttft_ms": {name: 1e3 * median(values) for name, values in ttft.items()},
    }


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Return the figures of a model."""
    shown = Table(title=f"{name}: stock → shared prefix")
    for column in ("prefix", "group", "decode tokens/s", "ratio (extremes)", "KV read ÷", "hit TTFT, ms"):
        shown.add_column(column)
    for one in rows:
        speed, ttft = one["decode_tokens_per_s"], one["hit_ttft_ms"]
        low, high = one["decode_ratio_spread"]
        shown.add_row(
            *(str(one["prefix"]), str(one["group"])),
            f"{speed['stock']:,.0f} → {speed['shared']:,.0f}",
            f"{one['decode_ratio']:.2f} ({low:.2f}-{high:.2f})",
            f"{one['kv_read_ratio']:.1f}",
            f"{ttft['stock']:.0f} → {ttft['shared']:.0f}",
        )
    return shown


def on_cpu(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Compare with two models on the CPU."""
    small = {"model_path": default_model()}
    found = {"small (2M)": asyncio.run(compare(small, PREFIXES, 48, rounds))}
    with larger_model() as model:
        larger = {"model_path": model, "flags": {"load_format": "dummy"}}
        found["larger (28M)"] = asyncio.run(compare(larger, PREFIXES, 16, rounds))
    return found


def on_gpu(model: Path, gpu: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Compare with one model on one GPU, which both runtimes share, both with FlashInfer."""
    flags = {"mem_fraction_static": 0.4, "attention_backend": "flashinfer"}
    how = {"model_path": model, "gpus": (gpu,), "flags": flags}
    return {model.name: asyncio.run(compare(how, GPU_PREFIXES, 128, rounds))}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    gpu: Annotated[int | None, typer.Option(help="A GPU to use instead of the CPU.")] = None,
    model: Annotated[Path | None, typer.Option(help="The model to use on it.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Measure, print and keep the figures."""
    if (gpu is None) != (model is None):
        raise typer.BadParameter("--gpu and --model go together")
    found = on_cpu(rounds) if gpu is None or model is None else on_gpu(model, gpu, rounds)
    for name, rows in found.items():
        Console(width=110).print(table(name, rows))
    device = "2 cores, float32" if gpu is None else f"GPU {gpu}"
    machine = f"{device}, {platform.machine()}, SGLang {metadata.version('sglang')}"
    out.write_bytes(
        orjson.dumps({"machine": machine, "rounds": rounds, "models": found}, option=orjson.OPT_INDENT_2)
    )
    best = max(one["decode_ratio"] for rows in found.values() for one in rows)
    print(orjson.dumps({"best_decode_ratio": best}).decode())


if __name__ == "__main__":
    typer.run(main)
