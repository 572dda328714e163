"""A batch of streamed calls on a fleet, its answers without faults, and the processes behind a worker."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from preble_sgl.core import (
    Chunk,
    Completion,
    ProgramId,
    Request,
    SamplingParams,
    TokenIds,
    WorkerId,
    new_request_id,
    token_ids,
)
from preble_sgl.fleet import Fleet


@dataclass(slots=True)
class Streamed:
    """What one call's listener was told: tokens and text by the number of the answer."""

    ids: dict[int, TokenIds] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)

    def __call__(self, chunk: Chunk, number: int) -> None:
        self.ids[number] = self.ids.get(number, token_ids()) + chunk.output_ids
        self.text[number] = self.text.get(number, "") + chunk.text


def batch(num_calls: int, output_len: int, seed: int = 0) -> list[Request]:
    """Return calls that share one of four documents each; two in three are plain, one has a grammar."""
    rng = random.Random(seed)
    documents = [_tokens(rng, 300) for _ in range(4)]
    return [
        Request(
            request_id=new_request_id(),
            program_id=ProgramId(f"row{number}"),
            call_path=f"row{number}/call0",
            prompt=documents[number % 4] + _tokens(rng, 20),
            sampling=SamplingParams(
                max_new_tokens=output_len,
                ignore_eos=True,
                regex="[a-z ]+" if number % 3 == 0 else None,
            ),
        )
        for number in range(num_calls)
    ]


async def run_batch(fleet: Fleet, requests: Sequence[Request]) -> list[tuple[Completion, Streamed]]:
    """Run all calls at once; return each answer and what was streamed of it."""

    async def one(request: Request) -> tuple[Completion, Streamed]:
        streamed = Streamed()
        return await fleet.generate(request, streamed), streamed

    return await asyncio.gather(*(one(request) for request in requests))


def check(answers: Sequence[tuple[Completion, Streamed]], expected: Sequence[Completion]) -> None:
    """Assert that every answer is the expected one, and that it was streamed once, whole and in order."""
    assert len(answers) == len(expected)
    for (completion, streamed), wanted in zip(answers, expected, strict=True):
        assert completion.output_ids == wanted.output_ids
        assert completion.text == wanted.text
        assert completion.usage.output_tokens == wanted.usage.output_tokens
        assert streamed.ids == {0: wanted.output_ids}
        assert streamed.text == {0: wanted.text}


def server_of(fleet: Fleet, worker_id: WorkerId) -> psutil.Process:
    """Return the main process of a worker's runtime."""
    (worker,) = [one for one in fleet.describe_workers() if one["worker_id"] == worker_id]
    port = worker["url"].rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[3:5] == ["-m", "sglang.launch_server"] and port in command:
            return process
    raise LookupError(f"no process serves {worker['url']}")


async def kill(fleet: Fleet, *worker_ids: WorkerId) -> None:
    """Kill the runtimes of workers, and wait until the fleet has noticed."""
    for server in [server_of(fleet, worker_id) for worker_id in worker_ids]:
        server.kill()
    while set(worker_ids) & set(fleet.worker_ids):
        await asyncio.sleep(0.01)


async def wait_workers(fleet: Fleet, num_workers: int) -> None:
    """Wait until so many workers are up."""
    while len(fleet.worker_ids) != num_workers:
        await asyncio.sleep(0.05)


def _tokens(rng: random.Random, length: int) -> TokenIds:
    return token_ids(rng.randrange(10, 2000) for _ in range(length))
