"""What it costs to follow the cache events of runtimes: tokens per second on one core.

    python -m benchmarks.experiments.cache_events [--rounds 5] [--out FILE]

Batches as SGLang publishes them (one prompt of 500 tokens, 300 of which follow a known prefix, then what was
evicted for it) are decoded, their hashes checked as in use (all at first, then one in 32), and applied to the
scheduler's prefix tree. Given is the median of the rounds, alternating page sizes.
"""

import gc
import platform
import random
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.core import CacheCleared, WorkerId, token_ids
from preble_sgl.global_sched.cache_feed import CacheFeed
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.runtime_ext.cache_events import EventReader
from preble_sgl.runtime_ext.emulated.kv_publisher import as_map
from preble_sgl.sim.kv_cache import KvCache

RESULT = Path("benchmarks/results/cache_events")
PAGE_SIZES = (1, 16)
PROMPTS = 4000
PREFIX_LEN, OWN_LEN = 208, 304
KV_TOKENS = 100_000
W = WorkerId("w")


def batches(page_size: int, seed: int) -> list[bytes]:
    """Return what a runtime publishes for the prompts, one batch each."""
    rng = random.Random(seed)
    cache = KvCache(KV_TOKENS, page_size, publish=True)
    prefixes = [[rng.randrange(32_000) for _ in range(PREFIX_LEN)] for _ in range(50)]
    found = [[as_map(CacheCleared())]]
    for _ in range(PROMPTS):
        prompt = token_ids(rng.choice(prefixes) + [rng.randrange(32_000) for _ in range(OWN_LEN)])
        packed = prompt.tobytes()
        node = cache.match(cache.root(""), packed, len(prompt))
        cache.lock(node)
        missing_len = len(prompt) - node.end_len
        assert cache.allocate(missing_len)
        tail = cache.adopt(node, packed)
        cache.free(missing_len - (tail.end_len - node.end_len))
        cache.unlock(node)
        found.append([as_map(event) for event in cache.take_events()])
    return [msgspec.msgpack.encode([0.0, events, 0]) for events in found]


def follow(payloads: list[bytes], page_size: int) -> tuple[float, float]:
    """Return the seconds of decoding and checking, and of applying."""
    tree = RadixTree(180.0)
    tree.add_worker(W, capacity=KV_TOKENS, page_size=page_size)
    feed, reader = CacheFeed(tree, W, page_size), EventReader(W)
    started_at = perf_counter()
    read = [reader.read(payload) for payload in payloads]
    read_at = perf_counter()
    for seq, events in enumerate(read):
        feed.receive(seq, events)
    return read_at - started_at, perf_counter() - read_at


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    gc.set_threshold(*GC_THRESHOLDS)
    prompt_tokens = PROMPTS * (PREFIX_LEN + OWN_LEN)
    measured: dict[int, list[tuple[float, float]]] = {page_size: [] for page_size in PAGE_SIZES}
    for number in range(rounds):
        for page_size in PAGE_SIZES:
            measured[page_size].append(follow(batches(page_size, number), page_size))
    table = Table(title=f"{PROMPTS:,} prompts of {PREFIX_LEN + OWN_LEN} tokens, most of them evicted again")
    for column in ("page size", "read and check", "apply", "prompt tokens per second", "µs per batch"):
        table.add_column(column)
    cases = []
    for page_size, times in measured.items():
        read_s, apply_s = median(one[0] for one in times), median(one[1] for one in times)
        rate = prompt_tokens / (read_s + apply_s)
        cases.append({"page_size": page_size, "times_s": times, "prompt_tokens_per_s": rate})
        per_batch = 1e6 * (read_s + apply_s) / PROMPTS
        table.add_row(
            str(page_size), f"{read_s:.2f} s", f"{apply_s:.2f} s", f"{rate:,.0f}", f"{per_batch:.0f}"
        )
    Console(width=110).print(table)
    result = {
        "cases": cases,
        "machine": f"one core, {platform.machine()}, Python {platform.python_version()}",
        "command": f"python -m benchmarks.experiments.cache_events --rounds {rounds}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(cases).decode())


if __name__ == "__main__":
    typer.run(main)
