"""Simulated runtimes that are lost and come back, and warm-ups on them."""

import random
from itertools import islice

import pytest

from preble_sgl.core import (
    ProgramId,
    Request,
    RequestId,
    RequestRecord,
    SamplingParams,
    WorkerId,
    token_ids,
)
from preble_sgl.errors import RequestRejected
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import Load
from preble_sgl.sim.points import OpenLoop, Setting
from preble_sgl.sim.simulator import SimulatedFleet, SimWorker
from preble_sgl.sim.virtual_time import VirtualTime

PROFILE = load_profile("a6000-mistral-7b")
HOT = list(range(2000))


def fleet(num_workers: int = 2) -> tuple[SimulatedFleet, VirtualTime]:
    clock = VirtualTime()
    workers = [SimWorker.of(f"w{i}", PROFILE) for i in range(num_workers)]
    return SimulatedFleet(make_scheduler("preble_e2", rng=random.Random(0)), workers, clock), clock


class Caller:
    """Submits calls over HOT and collects how they ended."""

    def __init__(self, one: SimulatedFleet) -> None:
        self.fleet = one
        self.ended: list[RequestRecord] = []

    def call(self, number: int, output_len: int = 50) -> None:
        request = Request(
            request_id=RequestId(f"{number:032}"),
            program_id=ProgramId(str(number)),
            call_path="call",
            prompt=token_ids([*HOT, 5000 + number]),
            sampling=SamplingParams(max_new_tokens=output_len),
        )
        self.fleet.submit(request, token_ids(range(9000, 9000 + output_len)), self._end)

    def _end(self, record: RequestRecord | RequestRejected) -> None:
        assert isinstance(record, RequestRecord)
        self.ended.append(record)


def test_the_calls_of_a_lost_runtime_run_again_and_its_cache_is_empty() -> None:
    one, clock = fleet(1)
    caller = Caller(one)
    clock.call_at(0.0, caller.call, 1)
    clock.call_at(10.0, caller.call, 2, 1000)
    clock.call_at(11.0, one.restart, WorkerId("w0"), 5.0)
    clock.run()
    first, second = caller.ended
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 0)
    assert second.placed_at == 16.0
    one.check_invariants()


def test_a_warm_up_lets_the_next_call_find_what_others_have() -> None:
    one, clock = fleet(2)
    caller = Caller(one)
    for number in range(6):
        clock.call_at(float(number), caller.call, number)
    for step in range(8):  # 512 tokens at a time
        clock.call_at(100.0 + step, one.warm_up)
    clock.call_at(150.0, one.check_invariants)
    for number in range(6, 8):
        clock.call_at(200.0, caller.call, number)
    clock.run()
    assert all(record.usage.cached_tokens >= 1024 for record in caller.ended[-2:])
    # The other worker was cold until it had half of what the first has.
    assert all(worker.used_tokens >= 1024 for worker in one.scheduler.snapshot().workers)


def test_a_call_that_is_placed_there_ends_a_warm_up() -> None:
    one, clock = fleet(2)
    caller = Caller(one)
    for number in range(6):
        clock.call_at(float(number), caller.call, number)
    clock.call_at(100.0, one.warm_up)
    for number in range(6, 12):
        clock.call_at(100.001, caller.call, number)
    clock.run()
    assert len(caller.ended) == 12
    one.check_invariants()


@pytest.mark.parametrize("with_warm_ups", [False, True])
def test_restarts_in_a_load_lose_no_request(with_warm_ups: bool) -> None:
    def play() -> list[tuple[str, float, int]]:
        clock = VirtualTime()
        sessions, arrivals = Load(workload="toolbench", rps=6.0, duration_s=40).play(0)
        setting = Setting(policy="preble_e2", gpus=3, profile=PROFILE, cache_events=True)
        loop = OpenLoop(setting.fleet(clock), clock, islice(sessions, 200), arrivals)
        loop.begin()
        for at in range(5, 60, 7):
            clock.call_at(float(at), loop.fleet.restart, WorkerId(f"gpu{at % 3:03d}"), 2.0)
            if with_warm_ups:
                for after in range(1, 7):
                    clock.call_at(float(at + after), loop.fleet.warm_up)
        clock.run()
        loop.fleet.check_invariants()
        return [(r.request_id, r.finished_at, r.usage.cached_tokens) for r in loop.records]

    first = play()
    assert len({request_id for request_id, _, _ in first}) == len(first) == 200
    assert first == play()
