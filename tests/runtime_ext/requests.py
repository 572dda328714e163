"""Make requests and collect their answers."""

from collections.abc import Iterable, Sequence
from typing import Any

from preble_sgl.core import Chunk, ProgramId, Request, SamplingParams, new_request_id, token_ids
from preble_sgl.runtime_ext.client import SglangRuntime


def request(
    prompt: Iterable[int], *, score_from: int | None = None, namespace: str = "", **params: Any
) -> Request:
    """Return a request for `prompt`; everything else goes to its sampling parameters."""
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("program"),
        call_path="program/gen",
        prompt=token_ids(prompt),
        sampling=SamplingParams(**params),
        score_from=score_from,
        namespace=namespace,
    )


async def run(runtime: SglangRuntime, wanted: Request) -> list[Chunk]:
    """Return all chunks of the answer."""
    return [chunk async for chunk in runtime.stream(wanted)]


def output_ids(chunks: Sequence[Chunk]) -> list[int]:
    """Return the ids of the whole output."""
    return [token for chunk in chunks for token in chunk.output_ids]


def text(chunks: Sequence[Chunk]) -> str:
    """Return the whole text."""
    return "".join(chunk.text for chunk in chunks)
