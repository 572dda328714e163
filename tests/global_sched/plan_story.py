"""A scheduler with mechanisms, driven by requests that name their program, tenant and priority."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from preble_sgl.core import PlanHint, ProgramId, SamplingParams
from preble_sgl.global_sched import CostProfile, GlobalScheduler, Mechanisms, make_policy
from tests.global_sched.stories import FREE_DECODE, Story, prompt, request


class PlanStory(Story):
    """A story whose requests name their program, tenant and priority."""

    def __init__(
        self,
        policy: str = "round_robin",
        workers: Sequence[str] = ("w0", "w1"),
        *,
        kv_tokens: int = 1_000_000,
        profile: CostProfile = FREE_DECODE,
        **mechanisms: Any,
    ) -> None:
        super().__init__("round_robin", (), kv_tokens=kv_tokens, profile=profile)
        self.scheduler = GlobalScheduler(
            make_policy(policy), rng=random.Random(0), mechanisms=Mechanisms(**mechanisms)
        )
        for worker in workers:
            self.up(worker)

    def ask(
        self,
        request_id: str,
        text: str,
        *,
        program: str | None = None,
        tenant: str = "default",
        priority: int = 0,
        max_tokens: int = 0,
    ) -> list[str]:
        """Submit a request and return what was sent then."""
        self.requests[request_id] = replace(
            request(request_id, text),
            program_id=ProgramId(program or request_id),
            tenant=tenant,
            priority=priority,
            sampling=SamplingParams(max_new_tokens=max_tokens),
        )
        self.scheduler.submit(self.requests[request_id], self.now)
        self.scheduler.check_invariants()
        return self.dispatch()

    def plan(
        self, program: str, kv_tokens: int | None = 0, *prefixes: str, deadline_at: float | None = None
    ) -> None:
        hint = PlanHint(
            program_id=ProgramId(program),
            kv_tokens=kv_tokens,
            prefixes=tuple(map(prompt, prefixes)),
            deadline_at=deadline_at,
        )
        self.scheduler.register_plan(hint, self.now)

    def release(self, program: str) -> list[str]:
        self.scheduler.release_program(ProgramId(program), self.now)
        return self.dispatch()

    def pause(self, program: str, expected_s: float) -> list[str]:
        self.scheduler.on_pause(ProgramId(program), expected_s, self.now)
        return self.dispatch()
