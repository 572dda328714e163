"""Schemathesis over the server's own document finds nothing that it answers with a 5xx."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from tests.server.serving import served_emulated

NUM_OPERATIONS = 20


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(served_emulated(tiny_model)) as server,
    ):
        yield server.url


def test_no_request_makes_the_server_fail(url: str) -> None:
    documented = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=10).json())
    num_operations = 0
    for found in documented.exclude(path_regex="drain|ui").get_all_operations():
        operation: Any = found
        num_operations += 1

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def answered(case: Any) -> None:
            case.call_and_validate(base_url=url, checks=[not_a_server_error])

        answered()
    assert num_operations == NUM_OPERATIONS
