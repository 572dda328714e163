"""The engine and the fleet against what is known without them: queueing theory, conservation, determinism."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import accumulate, islice, pairwise
from math import sqrt
from statistics import fmean, stdev

import pytest

from preble_sgl.core import ProgramId, Request, RequestId, RequestRecord, SamplingParams, TokenIds, token_ids
from preble_sgl.errors import RequestRejected
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.profiles import Profile, load_profile
from preble_sgl.sim.arrivals import poisson
from preble_sgl.sim.points import OpenLoop, Setting, simulate
from preble_sgl.sim.report import Summary
from preble_sgl.sim.simulator import SimulatedFleet, SimWorker
from preble_sgl.sim.step_cost import StepCost
from preble_sgl.sim.virtual_time import VirtualTime
from preble_sgl.sim.workloads import Session, Turn, random_tokens
from tests.sim.engines import engine, request

POLICIES = ["round_robin", "least_load", "sticky@4", "preble_e2", "preble_literal", "preble_plan"]
PROFILE = load_profile("a6000-mistral-7b")

SERVICE_S = 0.5
SERVICE = StepCost(floor_s=SERVICE_S, base_s=0.0, token_s=0.0)
SERVER = Profile(
    name="server",
    kind="made up",
    hardware="none",
    model="none",
    source="one request at a time, each as long",
    error="none",
    kv_tokens=1000,
    chunk_tokens=1000,
    step=SERVICE,
)


# M/D/1: requests that come by chance and each take as long


def instants(rate: float, num: int, seed: int) -> list[float]:
    return list(islice(poisson(rate, random.Random(seed)), num))


def waits_of_engine(arrivals: list[float]) -> list[float]:
    """Return how long each request waits before a bare engine serves it."""
    one, clock = engine(SERVICE, max_running=1, order="fcfs"), VirtualTime()
    waits: list[float] = []

    def arrive(number: int) -> None:
        one.submit(request(f"{number}", [number], 1), token_ids([7]), clock.time())
        if not one.is_running:
            start()

    def start() -> None:
        if (ends_at := one.start(clock.time())) is not None:
            clock.call_at(ends_at, end)

    def end() -> None:
        result = one.finish()
        waits.extend(ended.finished_at - ended.submitted_at - SERVICE_S for ended in result.finished)
        start()

    for number, at in enumerate(arrivals):
        clock.call_at(at, arrive, number)
    clock.run()
    return waits


def records_of_fleet(arrivals: list[float]) -> list[RequestRecord]:
    """Return what comes of the same requests in a simulated fleet of one worker."""
    clock = VirtualTime()
    worker = SimWorker.of("w0", SERVER, max_running=1, order="fcfs")
    fleet = SimulatedFleet(make_scheduler("round_robin", rng=random.Random(0)), [worker], clock)
    records: list[RequestRecord] = []

    def on_end(end: RequestRecord | RequestRejected) -> None:
        assert isinstance(end, RequestRecord)
        records.append(end)

    for number, at in enumerate(arrivals):
        clock.call_at(at, fleet.submit, request(f"{number}", [number], 1), token_ids([7]), on_end)
    clock.run()
    fleet.check_invariants()
    return records


def waits_of_fleet(arrivals: list[float]) -> list[float]:
    return [one.finished_at - one.submitted_at - SERVICE_S for one in records_of_fleet(arrivals)]


def half_width(values: list[float], num_batches: int = 20) -> float:
    """Return the half width of the 99.9 % confidence interval of a mean, from means of batches."""
    size = len(values) // num_batches
    means = [fmean(values[i * size : (i + 1) * size]) for i in range(num_batches)]
    return 3.883 * stdev(means) / sqrt(num_batches)  # Student's t with 19 degrees of freedom


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.85])
@pytest.mark.parametrize(
    ("serve", "num", "most_error"), [(waits_of_engine, 30_000, 0.15), (waits_of_fleet, 6000, 0.4)]
)
def test_one_request_at_a_time_waits_as_long_as_in_an_m_d_1_queue(
    serve: Callable[[list[float]], list[float]], num: int, most_error: float, rho: float
) -> None:
    waits = serve(instants(rho / SERVICE_S, num, seed=7))
    expected_s = rho * SERVICE_S / (2 * (1 - rho))
    error_s = half_width(waits)
    assert error_s < most_error * expected_s, "the run is long enough to tell"
    assert fmean(waits) == pytest.approx(expected_s, abs=error_s)


def test_engine_and_fleet_serve_alike() -> None:
    arrivals = instants(0.85 / SERVICE_S, 2000, seed=3)
    assert waits_of_engine(arrivals) == pytest.approx(waits_of_fleet(arrivals), abs=1e-9)


def test_each_wait_follows_from_the_one_before() -> None:
    """Lindley's recursion, which leaves nothing to chance."""
    arrivals = instants(0.85 / SERVICE_S, 2000, seed=4)
    gaps = [late - early for early, late in pairwise(arrivals)]
    expected = accumulate(gaps, lambda wait, gap: max(0.0, wait + SERVICE_S - gap), initial=0.0)
    assert waits_of_engine(arrivals) == pytest.approx(list(expected), abs=1e-9)


# A workload that shares prefixes, on a fleet


def sessions(seed: int, num: int, *, huge_every: int | None = None) -> Iterator[Session]:
    """Yield sessions of up to three turns that share prefixes; some prompts too long for any cache."""
    rng = random.Random(seed)
    trunks = [random_tokens(rng, rng.randint(100, 3000)) for _ in range(10)]
    for number in range(num):
        group = min(rng.randrange(10), rng.randrange(10))
        new = trunks[group] + random_tokens(rng, rng.randint(10, 400))
        if huge_every and number % huge_every == 0:
            new = random_tokens(rng, 60_000)
        turns = [Turn(new, random_tokens(rng, rng.randint(1, 120)))]
        for _ in range(rng.randrange(3)):
            turns.append(Turn(random_tokens(rng, 50), random_tokens(rng, 40), rng.random()))
        yield Session(tuple(turns), group)


def setting(policy: str, **settings: object) -> Setting:
    fields: dict[str, object] = {"gpus": 3, "profile": PROFILE, "kv_tokens": 20_000, "seed": 1}
    return Setting(policy=policy, **fields | settings)  # type: ignore[arg-type]


def run_loop(one: Setting, asked: Iterator[Session], rate: float = 6.0) -> OpenLoop:
    clock = VirtualTime()
    loop = OpenLoop(one.fleet(clock), clock, asked, poisson(rate, random.Random(2)))
    loop.begin()
    clock.run()
    loop.fleet.check_invariants()
    return loop


def test_littles_law_holds_from_empty_to_empty() -> None:
    records = run_loop(setting("preble_e2"), sessions(1, 100)).records
    changes = sorted([(one.submitted_at, 1) for one in records] + [(one.finished_at, -1) for one in records])
    began_at, ended_at = changes[0][0], changes[-1][0]
    num, area, before = 0, 0.0, began_at
    for at, change in changes:
        area += num * (at - before)
        num, before = num + change, at
    mean_num = area / (ended_at - began_at)
    rate = len(records) / (ended_at - began_at)
    mean_s = fmean(one.finished_at - one.submitted_at for one in records)
    assert num == 0
    assert mean_num > 1
    assert mean_num == pytest.approx(rate * mean_s, rel=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_token_is_lost_or_made(policy: str) -> None:
    asked = list(sessions(2, 100))
    loop = run_loop(setting(policy, cache_events=True), iter(asked))
    num_turns = sum(len(one.turns) for one in asked)
    assert (len(loop.records), loop.num_failed) == (num_turns, 0)
    assert sum(one.usage.prompt_tokens for one in loop.records) == sum(
        len(prompt) for one in asked for prompt in one.prompts()
    )
    assert sum(one.usage.output_tokens for one in loop.records) == sum(
        len(turn.output) for one in asked for turn in one.turns
    )
    engines = [runtime.engine for runtime in loop.fleet._runtimes.values()]
    computed = sum(one.usage.prompt_tokens - one.usage.cached_tokens for one in loop.records)
    assert computed == sum(one.load().prefilled_tokens for one in engines)
    assert not any(one.has_work or one.cache.num_private or one.cache.num_locked for one in engines)
    for one in loop.records:
        assert one.submitted_at <= one.placed_at <= one.first_token_at <= one.finished_at
        assert 0 <= one.usage.cached_tokens < one.usage.prompt_tokens


@pytest.mark.parametrize(
    "policy", [policy for policy in POLICIES if policy != "preble_literal"]
)  # its defect 3
def test_prompts_that_fit_nowhere_fail_and_everything_else_finishes(policy: str) -> None:
    asked = list(sessions(3, 80, huge_every=8))
    summary = simulate(setting(policy), iter(asked), poisson(6.0, random.Random(2)), num_requests=1_000_000)
    huge = [one for one in asked if len(one.turns[0].new) == 60_000]
    assert summary.failed == len(huge) == 10
    assert summary.finished == sum(len(one.turns) for one in asked) - sum(len(one.turns) for one in huge)


# Determinism


def summary_of(policy: str) -> Summary:
    return simulate(setting(policy), sessions(4, 100), poisson(6.0, random.Random(5)), num_requests=120)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seeds_give_the_same_summary(policy: str) -> None:
    assert summary_of(policy) == summary_of(policy)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_with_other_hashes_gives_the_same_summaries(hash_seed: str) -> None:
    code = (
        "from dataclasses import asdict\n"
        "from tests.sim.test_validity import POLICIES, summary_of\n"
        "for policy in POLICIES: print(sorted(asdict(summary_of(policy)).items()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        str(sorted(asdict(summary_of(policy)).items())) for policy in POLICIES
    ]


def test_other_seeds_give_another_summary() -> None:
    one = simulate(setting("preble_e2"), sessions(4, 100), poisson(6.0, random.Random(5)), num_requests=120)
    other = simulate(setting("preble_e2"), sessions(4, 100), poisson(6.0, random.Random(6)), num_requests=120)
    assert one != other


# A fleet from outside


def call(number: int, prompt: TokenIds, output_len: int) -> Request:
    return Request(
        request_id=RequestId(f"{number:08d}"),
        program_id=ProgramId(f"{number}"),
        call_path="call",
        prompt=prompt,
        sampling=SamplingParams(max_new_tokens=output_len, ignore_eos=True),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_calls_given_up_anywhere_leave_nothing_behind(policy: str) -> None:
    rng, clock = random.Random(9), VirtualTime()
    fleet = setting(policy, kv_tokens=6000).fleet(clock)
    trunk, ended, given_up = random_tokens(rng, 1000), set[RequestId](), set[RequestId]()

    def give_up(request_id: RequestId) -> None:
        if request_id not in ended:
            fleet.cancel(request_id)
            given_up.add(request_id)

    for number in range(150):
        one = call(number, trunk[: rng.randrange(1000)] + random_tokens(rng, 100), 300)
        at = rng.uniform(0, 20)
        clock.call_at(
            at, fleet.submit, one, random_tokens(rng, 300), lambda _, name=one.request_id: ended.add(name)
        )
        if rng.random() < 0.5:
            clock.call_at(at + rng.expovariate(0.3), give_up, one.request_id)
    clock.run()
    fleet.check_invariants()
    assert len(given_up) > 20
    assert not ended & given_up
    assert len(ended) + len(given_up) == 150
    assert not any(runtime.engine.has_work for runtime in fleet._runtimes.values())
    assert fleet.scheduler.num_queued == 0


def test_a_call_given_up_makes_room_at_once_for_one_that_waits() -> None:
    clock = VirtualTime()
    worker = SimWorker.of("w0", SERVER, max_running=1)
    fleet = SimulatedFleet(make_scheduler("round_robin", rng=random.Random(0)), [worker], clock)
    ended: list[tuple[float, RequestRecord | RequestRejected]] = []

    def on_end(end: RequestRecord | RequestRejected) -> None:
        ended.append((clock.time(), end))

    output = token_ids(range(500))
    clock.call_at(0.0, fleet.submit, call(1, token_ids([1]), 500), output, on_end)
    clock.call_at(0.1, fleet.submit, call(2, token_ids([2]), 1), output, on_end)
    clock.call_at(10.1, fleet.cancel, call(1, token_ids([1]), 500).request_id)
    clock.run()
    [(at, record)] = ended
    assert isinstance(record, RequestRecord)
    assert (record.request_id, at) == (call(2, token_ids([2]), 1).request_id, 10.5 + SERVICE_S)


def test_a_call_given_up_on_its_way_never_reaches_its_runtime() -> None:
    clock = VirtualTime()
    worker = SimWorker.of("w0", replace(SERVER, overhead_s=1.0))
    fleet = SimulatedFleet(make_scheduler("round_robin", rng=random.Random(0)), [worker], clock)
    records: list[RequestRecord | RequestRejected] = []
    given_up, kept = call(1, token_ids([1]), 1), call(2, token_ids([2]), 1)
    clock.call_at(0.0, fleet.submit, given_up, token_ids([7]), records.append)
    clock.call_at(0.5, fleet.cancel, given_up.request_id)
    clock.call_at(5.0, fleet.submit, kept, token_ids([7]), records.append)
    clock.run()
    [record] = records
    assert isinstance(record, RequestRecord)
    assert (record.request_id, record.submitted_at, record.placed_at) == (kept.request_id, 5.0, 5.0)
    assert record.finished_at == 5.0 + 1.0 + SERVICE_S
    assert fleet.busy_s == {worker.worker_id: SERVICE_S}
    fleet.check_invariants()
