"""Does it pay to pin an agent's KV while its tool runs? One real runtime on a CPU, with and without, in turn.

    python -m benchmarks.experiments.pinned_pauses [--rounds 6] [--share 0.3] [--out FILE]

16 agents over one system prompt make five calls each, with pauses of 0.2 to 0.5 s in between. Their KV is
twice what the runtime has, so that what a paused agent holds is often evicted. With pins, an agent's KV is
pinned for 0.8 s when it pauses. The model is tiny and a CPU's prefill cheap, so tokens count for more here
than seconds.
"""

import asyncio
import platform
import random
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.core import (
    PlanHint,
    ProgramId,
    Request,
    SamplingParams,
    Usage,
    WorkerId,
    new_request_id,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.fleet import Fleet
from preble_sgl.machine import default_model, profile_of
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes

RESULT = Path("benchmarks/results/pinned_pauses")
AGENTS, TURNS, KV_TOKENS = 16, 5, 6000
SYSTEM_LEN, OWN_LEN, RESULT_LEN, OUTPUT_LEN = 200, 400, 30, 20
PIN_S = 0.8


async def agent(fleet: Fleet, runtime: SglangRuntime, name: str, *, pins: bool) -> tuple[float, Usage]:
    """Run one agent; return its seconds and what its calls used."""
    rng, started_at, usage = random.Random(name), perf_counter(), Usage()
    program_id = ProgramId(f"{name} {pins}")
    prompt = token_ids(_tokens(random.Random(0), SYSTEM_LEN) + _tokens(rng, OWN_LEN))
    fleet.begin_program(PlanHint(program_id=program_id))
    for turn in range(TURNS):
        completion = await fleet.generate(_request(program_id, prompt.tolist()))
        usage += completion.usage
        prompt = prompt + completion.output_ids
        if turn < TURNS - 1:
            pause_s = rng.uniform(0.2, 0.5)
            pause = asyncio.create_task(asyncio.sleep(pause_s))
            if pins:
                await runtime.pin(program_id, prompt[:-1], expires_s=PIN_S)
            await pause
            prompt = prompt + token_ids(_tokens(rng, RESULT_LEN))
    fleet.end_program(program_id)
    return perf_counter() - started_at, usage


async def measure(rounds: int, share: float) -> dict[bool, list[dict[str, float]]]:
    """Return the figures of each round, without and with pins."""
    model = default_model()
    spec = LaunchSpec(model_path=model, worker_id=WorkerId("w"), kv_tokens=KV_TOKENS, max_pinned_share=share)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    async with launch_runtimes([spec]) as (runtime,):
        for number in range(rounds):
            for pins in ((False, True), (True, False))[number % 2]:
                await runtime.flush_cache()
                profile = profile_of(on_cpu=True)
                fleet = Fleet([runtime], chat=ChatFormat.load(model), profile=profile)
                started_at = perf_counter()
                ended = await asyncio.gather(
                    *(agent(fleet, runtime, f"{number} {i}", pins=pins) for i in range(AGENTS))
                )
                found[pins].append(
                    {
                        "makespan_s": perf_counter() - started_at,
                        "mean_agent_s": fmean(seconds for seconds, _ in ended),
                        "computed_tokens": sum(usage.computed_tokens for _, usage in ended),
                    }
                )
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    share: Annotated[float, typer.Option(help="Of the KV cache, that pins may hold.")] = 0.3,
    out: Annotated[Path, typer.Option(help="Where the .json goes.")] = RESULT,
) -> None:
    """Measure, print and keep the result."""
    found = asyncio.run(measure(rounds, share))
    table = Table(
        title=f"{AGENTS} agents with pauses on one real runtime (CPU), {rounds} rounds: median (range)"
    )
    for column in ("figure", "without pins", "with pins"):
        table.add_column(column)
    for name in ("computed_tokens", "mean_agent_s", "makespan_s"):
        table.add_row(name, *(_spread([one[name] for one in found[pins]]) for pins in (False, True)))
    Console(width=110).print(table)
    result: dict[str, Any] = {
        "without": found[False],
        "with": found[True],
        "share": share,
        "machine": f"2 cores, {platform.machine()}, Python {platform.python_version()}, SGLang on CPU",
        "command": f"python -m benchmarks.experiments.pinned_pauses --rounds {rounds} --share {share}",
    }
    out.with_suffix(".json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps(result).decode())


def _spread(values: list[float]) -> str:
    return f"{median(values):,.1f} ({min(values):,.1f}–{max(values):,.1f})"


def _request(program_id: ProgramId, prompt: list[int]) -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=program_id,
        call_path="agent",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=OUTPUT_LEN, ignore_eos=True),
    )


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, 2000) for _ in range(length)]


if __name__ == "__main__":
    typer.run(main)
