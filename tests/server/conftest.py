"""What tests of the server share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.serving import Served, served, served_emulated


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
