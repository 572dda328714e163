"""A small world for the stories in this folder: named prompt segments, round costs, a scheduler to drive."""

import random
import zlib
from collections.abc import Sequence

from preble_sgl.core import (
    Placement,
    ProgramId,
    Request,
    RequestId,
    SamplingParams,
    TokenIds,
    WorkerId,
    token_ids,
)
from preble_sgl.global_sched import CostProfile, GlobalScheduler, make_policy
from preble_sgl.profiles import load_profile

A6000_MISTRAL_7B = load_profile("a6000-mistral-7b").cost
CPU_TINY = load_profile("cpu-tiny").cost

ONE_SECOND_PER_TOKEN = CostProfile(
    name="test", source="round numbers", floor_s=0.0, base_s=0.0, token_s=1.0, decode_token_s=1.0
)
"""Every prefilled and every decoded token takes one second, so that costs can be added up in the head."""

FREE_DECODE = CostProfile(
    name="test", source="round numbers", floor_s=0.0, base_s=0.0, token_s=1.0, decode_token_s=0.0
)
"""Only prefill costs: a LoadCost is a number of tokens."""


def segment(name: str, length: int) -> list[int]:
    """Return tokens of their own: two segments of different names differ in the first token already."""
    first = zlib.crc32(name.encode()) % 1_000_000
    return [first * 1000 + i % 1000 for i in range(length)]


def prompt(text: str) -> TokenIds:
    """Return the tokens of segments written as `name:length`, such as `"system:100 document:1000"`."""
    parts = [part.split(":") for part in text.split()]
    return token_ids(token for name, length in parts for token in segment(name, int(length)))


def request(request_id: str, text: str, *, namespace: str = "", score_from: int | None = None) -> Request:
    return Request(
        request_id=RequestId(request_id),
        program_id=ProgramId("program"),
        call_path="call",
        prompt=prompt(text),
        namespace=namespace,
        score_from=score_from,
        sampling=SamplingParams(max_new_tokens=1000),
    )


class Story:
    """A scheduler with workers, checked after every step. Time moves only where the story says so."""

    def __init__(
        self,
        policy: str = "round_robin",
        workers: Sequence[str] = ("w0", "w1"),
        *,
        profile: CostProfile = FREE_DECODE,
        kv_tokens: int = 1_000_000,
        page_size: int = 1,
        window_s: float = 180.0,
        prefix_first: bool = True,
    ) -> None:
        self.now = 0.0
        self.profile = profile
        self.kv_tokens = kv_tokens
        self.page_size = page_size
        self.requests: dict[str, Request] = {}
        self.placed: dict[str, Placement] = {}
        self.scheduler = GlobalScheduler(
            make_policy(policy), rng=random.Random(0), window_s=window_s, prefix_first=prefix_first
        )
        for worker in workers:
            self.up(worker)

    def up(self, worker: str, *, kv_tokens: int | None = None) -> None:
        self.scheduler.on_worker_up(
            WorkerId(worker),
            kv_tokens=kv_tokens or self.kv_tokens,
            page_size=self.page_size,
            profile=self.profile,
            now=self.now,
        )
        self.scheduler.check_invariants()

    def submit(self, request_id: str, text: str, *, namespace: str = "") -> None:
        self.requests[request_id] = request(request_id, text, namespace=namespace)
        self.scheduler.submit(self.requests[request_id], self.now)
        self.scheduler.check_invariants()

    def dispatch(self) -> list[str]:
        """Return the ids of what was placed, in order."""
        placements = self.scheduler.dispatch(self.now)
        self.scheduler.check_invariants()
        self.placed |= {str(placement.request_id): placement for placement in placements}
        return [str(placement.request_id) for placement in placements]

    def call(self, request_id: str, text: str, *, namespace: str = "") -> Placement:
        """Submit a request that is placed at once."""
        self.submit(request_id, text, namespace=namespace)
        assert self.dispatch() == [request_id]
        return self.placed[request_id]

    def first_token(self, request_id: str) -> list[str]:
        self.scheduler.on_first_token(RequestId(request_id), self.now)
        self.scheduler.check_invariants()
        return self.dispatch()

    def finish(self, request_id: str, output: str = "", *, cached: int | None = None) -> list[str]:
        """End a request with the output segments `output`; return what can start now."""
        cached_tokens = self.placed[request_id].matched_len if cached is None else cached
        self.scheduler.on_finish(
            RequestId(request_id), output=prompt(output), cached_tokens=cached_tokens, now=self.now
        )
        self.scheduler.check_invariants()
        return self.dispatch()

    def cancel(self, request_id: str) -> list[str]:
        self.scheduler.on_cancel(RequestId(request_id), self.now)
        self.scheduler.check_invariants()
        return self.dispatch()

    def run(self, request_id: str, text: str, output: str = "") -> Placement:
        """Submit a request and let it finish at once."""
        placement = self.call(request_id, text)
        self.finish(request_id, output)
        return placement

    def worker_of(self, request_id: str) -> str:
        return str(self.placed[request_id].worker_id)
