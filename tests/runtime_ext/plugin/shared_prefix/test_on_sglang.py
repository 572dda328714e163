"""Shared prefixes read once inside real SGLang: the answers are those of the stock backend."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from preble_sgl.core import ProgramId, Request, SamplingParams, WorkerId, new_request_id, token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, check_specs
from preble_sgl.runtime_ext.launcher import launch_runtimes
from tests.runtime_ext.plugin.shared_prefix.wide_heads import with_wide_heads

pytestmark = pytest.mark.sglang

KINDS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "pages_of_16": {"flags": {"page_size": 16}},
    "chunked_and_evicting": {"kv_tokens": 3000, "flags": {"chunked_prefill_size": 256}},
    "mixed_chunks": {"flags": {"chunked_prefill_size": 512, "enable_mixed_chunk": True}},
}
NUM_TREES = 60
"""Of each kind; each is a batch of up to a dozen requests."""
NUM_TOP = 20
"""Log-probabilities compared per token, of the likeliest; they stand for the logits."""


TIE = 1e-5
"""Log-probabilities that near are as good as equal."""

Answer = tuple[list[int], list[list[float]]]
"""Tokens, and in the place of each the highest log-probabilities."""


@dataclass(frozen=True)
class Joining:
    """A request, and after how long it joins the batch."""

    prompt: list[int]
    num_tokens: int
    delay_s: float

    @property
    def request(self) -> Request:
        return Request(
            request_id=new_request_id(),
            program_id=ProgramId("p"),
            call_path="p/call0",
            prompt=token_ids(self.prompt),
            sampling=SamplingParams(max_new_tokens=self.num_tokens, ignore_eos=True),
            num_top_logprobs=NUM_TOP,
        )


@st.composite
def trees(draw: st.DrawFn, most_requests: int = 12) -> list[Joining]:
    """Draw requests on paths through a tree of one to four levels, of very different lengths."""
    rng = random.Random(draw(st.integers(0, 2**32)))  # for tokens alone
    node_lens, depth = st.sampled_from([150, 30, 3]), draw(st.integers(1, 4))
    nodes: dict[tuple[bool, ...], list[int]] = {}
    joining = []
    for _ in range(draw(st.integers(1, most_requests))):
        path = draw(st.tuples(*[st.booleans()] * depth))
        prompt: list[int] = []
        for level in range(1, depth + 1):
            if path[:level] not in nodes:
                nodes[path[:level]] = [rng.randrange(10, 250) for _ in range(draw(node_lens))]
            prompt += nodes[path[:level]]
        prompt += [rng.randrange(10, 250) for _ in range(draw(st.integers(1, 20)))]
        num_tokens, delay_s = draw(st.sampled_from([25, 5, 1])), draw(st.sampled_from([0.0, 0.0, 0.01, 0.03]))
        joining.append(Joining(prompt, num_tokens, delay_s))
    return joining


async def answer(runtime: SglangRuntime, joining: Joining) -> Answer:
    """Join the batch."""
    await asyncio.sleep(joining.delay_s)
    ids: list[int] = []
    async for chunk in runtime.stream(joining.request):
        ids += chunk.output_ids
    return ids, [[logprob for _, logprob in one.top] for one in chunk.output_logprobs]


async def leave(runtime: SglangRuntime, joining: Joining) -> None:
    """Join the batch and leave in the middle."""
    task = asyncio.create_task(answer(runtime, joining))
    await asyncio.sleep(joining.delay_s + 0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def answers(runtime: SglangRuntime, tree: list[Joining], leaving: list[Joining]) -> list[Answer]:
    """Answer a tree, beside requests that leave."""
    async with asyncio.TaskGroup() as group:
        for one in leaving:
            group.create_task(leave(runtime, one))
        return await asyncio.gather(*(answer(runtime, one) for one in tree))


def largest_difference(found: list[Answer], wanted: list[Answer]) -> float:
    """Return how far log-probabilities are off; tokens must be the same, up to a tie."""
    differences = [0.0]
    for (ids, tops), (wanted_ids, wanted_tops) in zip(found, wanted, strict=True):
        assert len(ids) == len(wanted_ids)
        for one, other, top, wanted_top in zip(ids, wanted_ids, tops, wanted_tops, strict=True):
            differences += [abs(a - b) for a, b in zip(top, wanted_top, strict=True)]
            if one != other:
                assert wanted_top[0] - wanted_top[1] < TIE
                break
    return max(differences)


@contextmanager
def stock_and_shared(model: Path, kind: str) -> Iterator[tuple[BlockingPortal, SglangRuntime, SglangRuntime]]:
    """Two runtimes on a loop of their own, as Hypothesis runs its examples outside of any."""
    specs = [
        LaunchSpec(model_path=model, worker_id=WorkerId(name), shared_prefix=name == "shared", **KINDS[kind])
        for name in ("stock", "shared")
    ]
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(launch_runtimes(specs)) as (stock, shared),
    ):
        yield portal, stock, shared


@pytest.mark.parametrize("kind", KINDS)
def test_random_trees_are_answered_as_by_the_stock_backend(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    model = with_wide_heads(tiny_model, tmp_path)
    seen: Counter[str] = Counter()
    off: dict[str, list[float]] = {"stock": [], "shared": []}
    with stock_and_shared(model, kind) as (portal, stock, shared):

        @settings(
            max_examples=NUM_TREES,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],  # nothing can be shrunk that depends on the time
            suppress_health_check=list(HealthCheck),
        )
        @given(tree=trees(), leaving=trees(most_requests=2))
        def compare(tree: list[Joining], leaving: list[Joining]) -> None:
            seen["trees"] += 1
            found = portal.call(answers, shared, tree, leaving)
            wanted = portal.call(answers, stock, tree, [])
            off["shared"].append(largest_difference(found, wanted))
            if seen["trees"] % 6 == 0:
                off["stock"].append(largest_difference(portal.call(answers, stock, tree, []), wanted))

        compare()
        marker, stock_marker = portal.call(shared.read_marker), portal.call(stock.read_marker)
    assert max(off["shared"]) < 5 * max(off["stock"]) + 1e-6
    assert seen["trees"] == NUM_TREES
    assert marker is not None
    assert marker.attention["decode: shared"] > NUM_TREES
    assert marker.attention["extend"] > NUM_TREES
    assert marker.attention["tokens saved"] > 0
    assert not any(name.startswith("stock") for name in marker.attention)
    assert stock_marker is not None
    assert not stock_marker.attention


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plugin": False}, "shared_prefix needs the plugin"),
        ({"flags": {"attention_backend": "triton"}}, "takes the place of torch_native: leave out"),
    ],
)
def test_it_is_refused_where_it_does_not_run(
    tiny_model: Path, settings: dict[str, Any], message: str
) -> None:
    spec = LaunchSpec(model_path=tiny_model, worker_id=WorkerId("a"), shared_prefix=True, **settings)
    with pytest.raises(InputError, match=message):
        check_specs([spec])
