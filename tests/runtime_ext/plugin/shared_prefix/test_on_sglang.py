"""Shared prefixes read once inside real SGLang: the answers are those of the stock backend."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from preble_sgl.core import ProgramId, Request, SamplingParams, WorkerId, new_request_id, token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, check_specs
from preble_sgl.runtime_ext.launcher import launch_runtimes

pytestmark = pytest.mark.sglang

KINDS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "pages_of_16": {"flags": {"page_size": 16}},
    "chunked_and_evicting": {"kv_tokens": 3000, "flags": {"chunked_prefill_size": 256}},
    "mixed_chunks": {"flags": {"chunked_prefill_size": 512, "enable_mixed_chunk": True}},
}
NUM_TREES = 60
"""Of each kind; each is a batch of up to a dozen requests."""


def random_tree(rng: random.Random) -> list[Request]:
    """Return requests on random paths through a tree of one to four levels, of very different lengths."""
    nodes: dict[tuple[int, ...], list[int]] = {}
    depth, requests = rng.randint(1, 4), []
    for _ in range(rng.randint(1, 12)):
        taken: tuple[int, ...] = ()
        prompt: list[int] = []
        for _ in range(depth):
            taken = (*taken, rng.randint(0, 1))
            if taken not in nodes:
                nodes[taken] = [rng.randrange(10, 250) for _ in range(rng.choice([3, 30, 150]))]
            prompt += nodes[taken]
        prompt += [rng.randrange(10, 250) for _ in range(rng.randint(1, 20))]
        sampling = SamplingParams(max_new_tokens=rng.choice([1, 5, 25]), ignore_eos=True)
        requests.append(
            Request(
                request_id=new_request_id(),
                program_id=ProgramId("p"),
                call_path="p/call0",
                prompt=token_ids(prompt),
                sampling=sampling,
                num_top_logprobs=1,
            )
        )
    return requests


async def answer(runtime: SglangRuntime, request: Request, delay_s: float) -> tuple[list[int], list[float]]:
    """Join the batch after a while; return tokens and their log-probabilities."""
    await asyncio.sleep(delay_s)
    ids: list[int] = []
    async for chunk in runtime.stream(request):
        ids += chunk.output_ids
    return ids, [one.logprob for one in chunk.output_logprobs]


async def abort(runtime: SglangRuntime, request: Request, delay_s: float) -> None:
    """Join the batch and leave in the middle."""
    task = asyncio.create_task(answer(runtime, request, delay_s))
    await asyncio.sleep(delay_s + 0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("kind", KINDS)
async def test_random_trees_are_answered_as_by_the_stock_backend(tiny_model: Path, kind: str) -> None:
    specs = [
        LaunchSpec(
            model_path=tiny_model, worker_id=WorkerId(name), shared_prefix=name == "shared", **KINDS[kind]
        )
        for name in ("stock", "shared")
    ]
    rng = random.Random(kind)
    async with launch_runtimes(specs) as (stock, shared):
        for _ in range(NUM_TREES):
            tree = random_tree(rng)
            delays = [rng.choice([0.0, 0.0, 0.01, 0.03]) for _ in tree]
            leaving = [abort(shared, one, 0.0) for one in random_tree(rng)[:2]]
            found = []
            for runtime, beside in ((stock, []), (shared, leaving)):
                answers = (answer(runtime, *one) for one in zip(tree, delays, strict=True))
                found.append((await asyncio.gather(*answers, *beside))[: len(tree)])
            for (ids, logprobs), (wanted_ids, wanted_logprobs) in zip(*found, strict=True):
                assert ids == wanted_ids
                assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
        marker, stock_marker = await shared.read_marker(), await stock.read_marker()
        assert marker is not None
        counts = marker.attention
        assert counts["decode: shared"] > 0
        assert counts["extend"] > 0
        assert counts["tokens saved"] > 0
        assert not any(name.startswith("stock") for name in counts)
        assert stock_marker is not None
        assert not stock_marker.attention


def test_it_is_refused_where_it_does_not_run(tiny_model: Path) -> None:
    spec = LaunchSpec(model_path=tiny_model, worker_id=WorkerId("a"), shared_prefix=True, plugin=False)
    with pytest.raises(InputError, match="shared_prefix needs the plugin"):
        check_specs([spec])
