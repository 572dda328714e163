"""Leaving a fleet with a notice: what is valuable is computed elsewhere first, what cannot finish moves."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from preble_sgl.core import (
    Chunk,
    ProgramId,
    Request,
    SamplingParams,
    Usage,
    WorkerId,
    new_request_id,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.fleet import Fleet
from tests.fakes import FakeRuntime
from tests.global_sched.stories import CPU_TINY

SHARED = list(range(100, 200))


class Warmable(FakeRuntime):
    """A fake that remembers what it computed ahead of use."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(worker_id)
        self.warmed: list[list[int]] = []

    async def stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Answer a warm-up at once, anything else as the fake does."""
        if request.sampling.max_new_tokens == 0:
            self.warmed.append(request.prompt.tolist())
            yield Chunk(token_ids(), "", "length", Usage(len(request.prompt), 0, 0))
            return
        async for chunk in super().stream(request):
            yield chunk


def request(*prompt: int) -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=2),
    )


async def test_what_only_the_leaving_worker_has_is_computed_elsewhere_and_its_calls_move(
    tiny_model: Path,
) -> None:
    a, b = Warmable("a"), Warmable("b")
    fleet = Fleet((a, b), chat=ChatFormat.load(tiny_model), profile=CPU_TINY, policy="sticky")
    for number in range(3):
        await fleet.generate(request(*SHARED, number))
    home, other = (a, b) if a.served else (b, a)
    assert len(home.served) == 3
    home.may_finish.clear()
    running = asyncio.create_task(fleet.generate(request(*SHARED, 9)))
    await home.streaming.wait()
    home.streaming.clear()
    while fleet.num_running(home.info.worker_id) == 0:
        await asyncio.sleep(0)
    await fleet.drain(home.info.worker_id, notice_s=0.2)
    assert other.warmed[0][: len(SHARED)] == SHARED
    assert (await running).text == "ab"
    assert len(other.served) == 1
    assert fleet.worker_ids == (other.info.worker_id,)
    fleet.scheduler.check_invariants()


async def test_a_call_that_ends_within_the_notice_stays(tiny_model: Path) -> None:
    a, b = Warmable("a"), Warmable("b")
    fleet = Fleet((a, b), chat=ChatFormat.load(tiny_model), profile=CPU_TINY, policy="round_robin")
    a.may_finish.clear()
    running = asyncio.create_task(fleet.generate(request(1, 2, 3)))
    await a.streaming.wait()
    draining = asyncio.create_task(fleet.drain(WorkerId("a"), notice_s=60.0))
    await asyncio.sleep(0.01)
    a.may_finish.set()
    await draining  # at once, not after a minute
    assert ((await running).text, len(a.served), b.served) == ("ab", 1, [])
