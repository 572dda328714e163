"""The tree knows what a real runtime has cached: probes find exactly what it says, under eviction too."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from preble_sgl.core import TokenIds, WorkerId, token_ids
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes
from preble_sgl.runtime_ext.subscriber import CacheSubscriber
from tests.runtime_ext.requests import output_ids, request, run
from tests.runtime_ext.test_subscriber import WORKER, Follower

pytestmark = pytest.mark.sglang

KV_TOKENS = 4096
PAGE_SIZES = (1, 16)
NUM_ROUNDS = 40
NUM_PROBES = 5


@pytest.fixture(scope="module")
def urls(tiny_model: Path) -> Iterator[dict[int, str]]:
    """A runtime with little KV for each page size."""
    specs = [
        LaunchSpec(
            model_path=tiny_model,
            worker_id=WorkerId(f"page{size}"),
            kv_tokens=KV_TOKENS,
            flags={"page_size": size},
        )
        for size in PAGE_SIZES
    ]
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(launch_runtimes(specs)) as runtimes,
    ):
        yield {size: one.info.url for size, one in zip(PAGE_SIZES, runtimes, strict=True)}


@dataclass
class Story:
    """Random prompts that share beginnings of a few documents, and what is known of the cache."""

    runtime: SglangRuntime
    follower: Follower
    rng: random.Random
    documents: list[TokenIds] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.documents = [self._tokens(self.rng.randrange(100, 700)) for _ in range(12)]

    @property
    def page_size(self) -> int:
        return self.runtime.info.page_size

    async def work(self) -> None:
        """Run a few requests at once, and wait until their ends were told."""
        asked = [request(self.prompt(), max_new_tokens=self.rng.randrange(1, 12)) for _ in range(3)]
        answers = await asyncio.gather(*(run(self.runtime, one) for one in asked))
        for one, chunks in zip(asked, answers, strict=True):
            computed = one.prompt + token_ids(output_ids(chunks)[:-1])
            await self.wait_known(computed)

    async def probe(self, prompt: TokenIds) -> tuple[int, int]:
        """Return what the tree says that the runtime has of a prompt, and what the runtime finds."""
        known_len = self.known(prompt[:-1])  # the last token is computed in any case
        found_len = len(prompt) - await self.runtime.warm(prompt)
        await self.wait_known(prompt)
        return known_len, found_len

    async def wait_known(self, prompt: TokenIds) -> None:
        """Wait until it was told that a whole prompt is cached."""
        while self.known(prompt) < len(prompt) - len(prompt) % self.page_size:
            await asyncio.sleep(0.002)

    def known(self, prompt: TokenIds) -> int:
        return self.follower.tree.match("", prompt.tobytes()).len_on(WORKER)

    def prompt(self) -> TokenIds:
        document = self.rng.choice(self.documents)
        begin = document[: self.rng.randrange(len(document) + 1)]
        return begin + self._tokens(self.rng.randrange(1, 60))

    def _tokens(self, length: int) -> TokenIds:
        return token_ids(self.rng.randrange(10, 2000) for _ in range(length))


@asynccontextmanager
async def following(story: Story) -> AsyncIterator[None]:
    source = story.runtime.info.events
    assert source is not None
    task = asyncio.create_task(CacheSubscriber(source, WORKER, story.follower).follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def follower(page_size: int) -> Follower:
    return Follower(capacity=KV_TOKENS, page_size=page_size)


async def probe_round(story: Story) -> None:
    await story.work()
    for _ in range(NUM_PROBES):
        known_len, found_len = await story.probe(story.prompt())
        assert known_len == found_len


@pytest.mark.parametrize("page_size", PAGE_SIZES)
async def test_a_probe_finds_what_the_tree_says(urls: dict[int, str], page_size: int) -> None:
    async with SglangRuntime.attach(urls[page_size]) as runtime:
        story = Story(runtime, follower(page_size), random.Random(page_size))
        async with following(story):
            for _ in range(NUM_ROUNDS):
                await probe_round(story)
            computed = (await runtime.loads()).prefilled_tokens
        story.follower.tree.check_invariants()
    assert computed > 5 * KV_TOKENS  # so most of it was evicted again
    assert story.follower.num_lost == 0


@pytest.mark.parametrize("page_size", PAGE_SIZES)
async def test_after_a_lost_connection_or_a_flush_the_tree_is_right_again(
    urls: dict[int, str], page_size: int
) -> None:
    async with SglangRuntime.attach(urls[page_size]) as runtime:
        story = Story(runtime, follower(page_size), random.Random(100 + page_size))
        async with following(story):
            await probe_round(story)
        for _ in range(20):  # nobody listens
            await runtime.warm(story.prompt())
        async with following(story):
            last = story.prompt()
            await runtime.warm(last)
            await story.wait_known(last)
            await probe_round(story)
            await runtime.flush_cache()
            while story.known(last):
                await asyncio.sleep(0.002)
            await probe_round(story)
        story.follower.tree.check_invariants()
