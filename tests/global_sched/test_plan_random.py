"""Random lives with plans, tenants, priorities and every mechanism: nothing is lost or waits forever."""

import random

import pytest

from preble_sgl.core import PlanHint, ProgramId, Request, RequestId, SamplingParams, token_ids
from preble_sgl.global_sched import make_scheduler
from tests.global_sched.test_scheduler_random import DOCUMENTS, SYSTEM, Life

NAMES = ("preble_plan", "preble_plan@3", "round_robin@2", "preble_e2@5")


class PlannedLife(Life):
    """A life in which requests belong to programs, some of them planned."""

    def __init__(self, name: str, seed: int, *, kv_tokens: int) -> None:
        super().__init__("round_robin", seed, kv_tokens=kv_tokens)
        objective = "latency" if name == "preble_plan" and seed % 2 else "throughput"
        self.scheduler = make_scheduler(
            name,
            rng=random.Random(seed),
            window_s=20.0,
            objective=objective,  # type: ignore[arg-type]
        )
        self.planned: set[ProgramId] = set()
        self.num_programs = 0

    def step(self) -> None:
        self.rng.choices(
            [super().step, self.plan, self.release, self.pause, self.branch_done], [20, 2, 1, 1, 1]
        )[0]()

    def submit(self) -> None:
        request_id = RequestId(f"r{len(self.prompts)}")
        ids = SYSTEM + self.rng.choice(DOCUMENTS)[: self.rng.choice([20, 60])] + self.own_tokens()
        self.prompts[request_id] = ids
        self.unfinished.add(request_id)
        request = Request(
            request_id=request_id,
            program_id=self.program(),
            call_path="c",
            prompt=token_ids(ids),
            sampling=SamplingParams(max_new_tokens=self.rng.randint(0, 100)),
            tenant=self.rng.choice(["a", "b"]),
            priority=self.rng.choice([0, 0, 1]),
        )
        self.scheduler.submit(request, self.now)

    def program(self) -> ProgramId:
        if self.planned and self.rng.random() < 0.6:
            return self.rng.choice(sorted(self.planned))
        return ProgramId(f"u{self.rng.randint(0, 6)}")

    def plan(self) -> None:
        self.num_programs += 1
        program_id = ProgramId(f"p{self.num_programs}")
        self.planned.add(program_id)
        hint = PlanHint(
            program_id=program_id,
            kv_tokens=self.rng.choice([None, self.rng.randint(0, 1000)]),
            prefixes=(token_ids(SYSTEM + self.rng.choice(DOCUMENTS)),),
            deadline_at=self.rng.choice([None, self.now + 10]),
        )
        self.scheduler.register_plan(hint, self.now)

    def release(self) -> None:
        if self.planned:
            program_id = self.rng.choice(sorted(self.planned))
            self.planned.discard(program_id)
            self.scheduler.release_program(program_id, self.now)

    def branch_done(self) -> None:
        if self.planned:
            program_id = self.rng.choice(sorted(self.planned))
            self.scheduler.on_branch_done(program_id, self.rng.randint(0, 500), self.now)

    def pause(self) -> None:
        if self.planned:
            self.scheduler.on_pause(self.rng.choice(sorted(self.planned)), self.rng.random(), self.now)

    def run_down(self) -> None:
        while self.planned:
            self.release()
        super().run_down()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_every_invariant_holds(name: str, seed: int) -> None:
    life = PlannedLife(name, seed, kv_tokens=(300, 600, 100_000)[seed % 3])
    for _ in range(300):
        life.step()
        life.check()
    life.run_down()
    assert life.scheduler.snapshot().num_open_programs == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_and_seed_give_the_same_decisions(name: str) -> None:
    logs = []
    for _ in range(2):
        life = PlannedLife(name, seed=7, kv_tokens=600)
        for _ in range(400):
            life.step()
        logs.append(life.log)
    assert len(logs[0]) > 20
    assert logs[0] == logs[1]
