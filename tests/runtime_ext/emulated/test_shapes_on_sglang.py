"""An emulated runtime beside a real one: the same statuses, and no field that SGLang has not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.runtime_ext.emulated.runtimes import Emulated, Reply, config, running

pytestmark = pytest.mark.sglang

MESSAGES = [{"role": "user", "content": "hello"}]
FEW = {"max_new_tokens": 3}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "hello there", "sampling_params": FEW}),
    ("/generate", {"text": "hello there", "sampling_params": FEW, "stream": True}),
    ("/generate", {"text": ["hello", "there"], "sampling_params": FEW, "stream": True}),
    ("/generate", {"text": 5}),
    ("/generate", {}),
    ("/generate", {"input_ids": []}),
    ("/generate", {"input_ids": [5] * 70_000}),
    ("/generate", {"input_ids": [5] * 70_000, "stream": True}),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "max_tokens": 3}),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "max_tokens": 3, "stream": True}),
    ("/v1/chat/completions", {"model": "m", "messages": []}),
    ("/v1/completions", {"model": "m", "prompt": "hello", "max_tokens": 3}),
    ("/v1/completions", {"model": "m", "prompt": "hello", "max_tokens": 3, "stream": True}),
    ("/abort_request", {"rid": "nobody"}),
]
REPORTS = ["/model_info", "/v1/models", "/v1/loads", "/server_info", "/flush_cache", "/ready", "/nothing"]


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Yield the path of every field; all entries of a list count as one."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield f"{at}.{name}"
            yield from paths(below, f"{at}.{name}")
    elif isinstance(value, list):
        for below in value:
            yield from paths(below, f"{at}[]")


def fields(reply: Reply) -> set[str]:
    if reply.body.startswith(b"data: "):
        return set(paths(reply.events))
    return set(paths(reply.json)) if reply.body.startswith((b"{", b"[")) else {reply.body.decode()}


async def test_every_answer_is_made_of_sglangs_fields(
    runtime_urls: tuple[str, str], tiny_model: Path
) -> None:
    given = config(model_path=str(tiny_model), incremental=True, engine={"kv_tokens": 65536})
    async with running(given) as emulated, aiohttp.ClientSession() as session:
        real = Emulated(runtime_urls[0], session)
        for path, body in CALLS:
            ours, theirs = await emulated.post(path, **body), await real.post(path, **body)
            assert (path, ours.status) == (path, theirs.status)
            assert fields(ours) - fields(theirs) == set(), (path, body)
        for path in REPORTS:
            ours, theirs = await emulated.get(path), await real.get(path)
            assert (path, ours.status) == (path, theirs.status)
            unknown = {name for name in fields(ours) - fields(theirs) if "emulated" not in name}
            assert {name for name in unknown if "internal_states" not in name} == set(), path
