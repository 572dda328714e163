"""What a router in front of the runtimes adds: ours, two peers, and none, in one run on loopback.

    python -m benchmarks.experiments.gateway [--rounds 5] [--peers DIR] [--out FILE]

Two runtimes answer at once (`benchmarks/gateway/instant_runtime.py`), so that what is measured is the router.
Each round asks every contender in rotating order: one client after another answer (latency), 32 clients at
once (requests per second), and 32 clients that stream 64 events each (events per second). Load, router and
runtimes share the machine's cores, so rates are of all three together; `direct` shows what is left for a
router. Peers are installed from PyPI into environments under DIR.
"""

import os
import platform
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import orjson
import typer
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gateway.contenders import PEERS, contenders
from benchmarks.gateway.load import bodies, measure
from preble_sgl.machine import default_model

RESULT = Path("benchmarks/results/gateway.json")
NUM_ALONE, NUM_AT_ONCE, NUM_STREAMS, NUM_CLIENTS = 300, 2000, 400, 32

Round = dict[str, float]


async def one_round(url: str, model: str, seed: int) -> Round:
    """Ask one contender everything once."""
    alone = await measure(url, bodies(model, NUM_ALONE, False, seed), 1)
    together = await measure(url, bodies(model, NUM_AT_ONCE, False, seed + 1), NUM_CLIENTS)
    streams = await measure(url, bodies(model, NUM_STREAMS, True, seed + 2), NUM_CLIENTS)
    return {
        "p50_ms": 1e3 * median(alone.latencies),
        "p99_ms": 1e3 * quantiles(alone.latencies, n=100)[98],
        "requests_per_s": NUM_AT_ONCE / together.took_s,
        "events_per_s": streams.num_chunks / streams.took_s,
    }


async def run(num_rounds: int, peers: Path) -> dict[str, list[Round]]:
    """Run the rounds, contenders in rotating order, after one that warms up."""
    model = default_model()
    rounds: dict[str, list[Round]] = defaultdict(list)
    async with contenders(model, peers) as urls:
        for url in urls.values():
            await measure(url, bodies(str(model), 200, False, 0), 8)
        for number in track(range(num_rounds), description="rounds"):
            names = list(urls)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rounds[name].append(await one_round(urls[name], str(model), number))
    return dict(rounds)


def medians(rounds: list[Round]) -> Round:
    """Return the median over rounds of each figure, and its spread as (max - min) / median."""
    found = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        found[name] = median(values)
        found[f"{name}_spread"] = (max(values) - min(values)) / median(values)
    return found


def table(results: dict[str, Round]) -> Table:
    """Return the figures, latency as what is added to `direct`."""
    shown = Table("contender", "added p50", "added p99", "requests/s", "events/s", box=None)
    direct = results["direct"]
    for name, one in results.items():
        added = [f"{one[field] - direct[field]:+.2f} ms" for field in ("p50_ms", "p99_ms")]
        shown.add_row(name, *added, f"{one['requests_per_s']:,.0f}", f"{one['events_per_s']:,.0f}")
    return shown


def main(
    rounds: Annotated[int, typer.Option("--rounds", help="Of every contender.")] = 5,
    peers: Annotated[Path, typer.Option("--peers", help="Where the peers are or get installed.")] = Path(
        ".peers"
    ),
    out: Annotated[Path, typer.Option("--out", help="Where the figures go.")] = RESULT,
) -> None:
    """Run it and write the figures."""
    measured = uvloop.run(run(rounds, peers))
    results = {name: medians(found) for name, found in measured.items()}
    Console().print(table(results))
    best = max(one["requests_per_s"] for name, one in results.items() if name.startswith(tuple(PEERS)))
    summary: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "rounds": rounds,
        "results": results,
        "requests_per_s_to_best_peer": results["preble_sgl"]["requests_per_s"] / best,
    }
    out.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    print(orjson.dumps({"requests_per_s_to_best_peer": summary["requests_per_s_to_best_peer"]}).decode())


if __name__ == "__main__":
    typer.run(main)
