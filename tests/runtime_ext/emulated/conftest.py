"""A quick runtime for every test that needs no other."""

from collections.abc import AsyncIterator

import pytest

from tests.runtime_ext.emulated.runtimes import Emulated, running


@pytest.fixture
async def quick() -> AsyncIterator[Emulated]:
    async with running() as emulated:
        yield emulated
