"""Random lives of a fleet: whatever happens, no request is lost and every invariant holds."""

import random

import pytest

from preble_sgl.core import Placement, ProgramId, Request, RequestId, WorkerId, token_ids
from preble_sgl.global_sched import POLICIES, GlobalScheduler, make_policy
from tests.global_sched.stories import A6000_MISTRAL_7B

SYSTEM = list(range(1000, 1040))
DOCUMENTS = [list(range(start, start + 60)) for start in (2000, 3000, 4000)]


class Life:
    """Drives a scheduler at random, and knows which requests must still come out of it."""

    def __init__(self, policy: str, seed: int, *, prefix_first: bool = True, kv_tokens: int = 600) -> None:
        self.rng = random.Random(seed)
        self.scheduler = GlobalScheduler(
            make_policy(policy), rng=random.Random(seed), window_s=20.0, prefix_first=prefix_first
        )
        self.kv_tokens = kv_tokens
        self.now = 0.0
        self.unfinished: set[RequestId] = set()
        self.sent: dict[RequestId, WorkerId] = {}
        self.decoding: set[RequestId] = set()
        self.prompts: dict[RequestId, list[int]] = {}
        self.workers: set[WorkerId] = set()
        self.log: list[Placement] = []

    def step(self) -> None:
        actions = [
            self.submit,
            self.first_token,
            self.finish,
            self.cancel,
            self.up,
            self.down,
            self.drain,
            self.clear,
        ]
        self.rng.choices(actions, [8, 6, 6, 1, 0.6, 0.3, 0.2, 0.2])[0]()
        if self.rng.random() < 0.7:
            self.dispatch()
        self.now += self.rng.random()

    def submit(self) -> None:
        request_id = RequestId(f"r{len(self.prompts)}")
        ids = SYSTEM + self.rng.choice(DOCUMENTS)[: self.rng.choice([20, 60])] + self.own_tokens()
        if self.prompts and self.rng.random() < 0.3:
            ids = self.rng.choice(list(self.prompts.values())) + self.own_tokens()
        self.prompts[request_id] = ids
        self.unfinished.add(request_id)
        prompt = token_ids(ids)
        self.scheduler.submit(
            Request(request_id=request_id, program_id=ProgramId("p"), call_path="c", prompt=prompt), self.now
        )

    def own_tokens(self) -> list[int]:
        return self.rng.choices([1, 2, 3], k=self.rng.randint(1, 40))

    def dispatch(self) -> None:
        for placement in self.scheduler.dispatch(self.now):
            assert placement.request_id in self.unfinished
            assert placement.request_id not in self.sent
            assert placement.worker_id in self.workers
            assert placement.matched_len < len(self.prompts[placement.request_id])
            self.sent[placement.request_id] = placement.worker_id
            self.log.append(placement)

    def first_token(self) -> None:
        waiting = sorted(self.sent.keys() - self.decoding)
        if waiting:
            request_id = self.rng.choice(waiting)
            self.scheduler.on_first_token(request_id, self.now)
            self.decoding.add(request_id)

    def finish(self) -> None:
        if self.sent:
            request_id = self.rng.choice(sorted(self.sent))
            output = self.own_tokens()
            self.prompts[request_id] = self.prompts[request_id] + output
            self.forget(request_id)
            self.scheduler.on_finish(request_id, output=token_ids(output), cached_tokens=0, now=self.now)

    def cancel(self) -> None:
        if self.unfinished:
            request_id = self.rng.choice(sorted(self.unfinished))
            self.forget(request_id)
            self.scheduler.on_cancel(request_id, self.now)

    def forget(self, request_id: RequestId) -> None:
        self.unfinished.discard(request_id)
        self.sent.pop(request_id, None)
        self.decoding.discard(request_id)

    def up(self) -> None:
        if len(self.workers) < 4:
            worker_id = WorkerId(f"w{self.now}")
            self.workers.add(worker_id)
            self.scheduler.on_worker_up(
                worker_id,
                kv_tokens=self.kv_tokens,
                page_size=self.rng.choice([1, 1, 16]),
                profile=A6000_MISTRAL_7B,
                now=self.now,
            )

    def down(self) -> None:
        if self.workers:
            worker_id = self.rng.choice(sorted(self.workers))
            self.workers.discard(worker_id)
            returned = self.scheduler.on_worker_down(worker_id, self.now)
            assert set(returned) == {rid for rid, where in self.sent.items() if where == worker_id}
            for request_id in returned:
                del self.sent[request_id]
                self.decoding.discard(request_id)

    def drain(self) -> None:
        if self.workers:
            self.scheduler.on_worker_drain(self.rng.choice(sorted(self.workers)), self.now)

    def clear(self) -> None:
        if self.workers:
            self.scheduler.on_cache_cleared(self.rng.choice(sorted(self.workers)), self.now)

    def check(self) -> None:
        self.scheduler.check_invariants()
        assert self.scheduler.num_running == len(self.sent)
        waiting = self.scheduler.num_queued + self.scheduler.num_held
        assert waiting == len(self.unfinished) - len(self.sent)

    def run_down(self) -> None:
        """Let everything that is left finish."""
        self.workers.add(WorkerId("last"))
        self.scheduler.on_worker_up(
            WorkerId("last"), kv_tokens=self.kv_tokens, profile=A6000_MISTRAL_7B, now=self.now
        )
        while self.unfinished:
            self.dispatch()
            assert self.sent, "requests wait for each other"
            self.finish()
            self.check()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_and_every_invariant_holds(policy: str, seed: int) -> None:
    life = Life(policy, seed, prefix_first=seed % 4 != 3, kv_tokens=(300, 600, 100_000, 600)[seed % 4])
    for _ in range(300):
        life.step()
        life.check()
    life.run_down()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_inputs_and_seed_give_the_same_decisions(policy: str) -> None:
    logs = []
    for _ in range(2):
        life = Life(policy, seed=7)
        for _ in range(300):
            life.step()
        logs.append(life.log)
    assert len(logs[0]) > 30
    assert logs[0] == logs[1]
