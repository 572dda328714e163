"""What all tests share: a tiny model, and two real SGLang runtimes that are started once."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from preble_sgl.core import WorkerId
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.environment import missing_requirements
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes
from preble_sgl.runtime_ext.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model with random weights, a tokenizer and a chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def runtime_urls(tiny_model: Path) -> Iterator[tuple[str, str]]:
    """The URLs of two real runtimes on the CPU, kept in a thread of their own, as no test's loop lasts."""
    if missing := missing_requirements(gpu=False):
        pytest.skip(f"real SGLang cannot run here: {missing[0]}")
    specs = [LaunchSpec(model_path=tiny_model, worker_id=WorkerId(f"w{index}")) for index in range(2)]
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(launch_runtimes(specs)) as (first, second),
    ):
        yield first.info.url, second.info.url


@pytest.fixture
async def runtimes(runtime_urls: tuple[str, str]) -> AsyncIterator[tuple[SglangRuntime, SglangRuntime]]:
    """The two runtimes, attached as `w0` and `w1`, with empty caches."""
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(SglangRuntime.attach(url, worker_id=WorkerId(f"w{index}")))
            for index, url in enumerate(runtime_urls)
        ]
        await first.flush_cache()
        await second.flush_cache()
        yield first, second
