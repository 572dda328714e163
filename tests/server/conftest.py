"""What tests of the server share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server import serving
from tests.server.serving import Served, served, served_emulated


@pytest.fixture(params=[False, True], ids=["one_process", "front"])
def with_and_without_front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test's servers be one process, and then have a front that is another."""
    monkeypatch.setattr(serving, "WITH_FRONT", request.param)


@pytest.fixture
async def emulated(tiny_model: Path) -> AsyncIterator[Served]:
    """A server over two quick emulated runtimes."""
    async with served_emulated(tiny_model) as server:
        yield server


@pytest.fixture
async def real(runtime_urls: tuple[str, str], tiny_model: Path) -> AsyncIterator[Served]:
    """A server over two real runtimes with empty caches."""
    async with served(runtime_urls, tiny_model) as server:
        await server.fleet.flush_cache()
        yield server
