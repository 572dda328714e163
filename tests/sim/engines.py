"""Engines and requests for the stories in this folder."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, TokenIds, token_ids
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import Finished, StepResult
from preble_sgl.sim.step_cost import StepCost

TOKEN_SECOND = StepCost(floor_s=0.0, base_s=0.0, token_s=1.0)
"""Every new token takes a second, a decode step as many seconds as there are requests."""

STEP_SECOND = StepCost(floor_s=1.0, base_s=0.0, token_s=0.0)
"""Every iteration takes a second, whatever is in it."""


def pack(tokens: Iterable[int]) -> bytes:
    """Return tokens in the form that the cache compares."""
    return token_ids(tokens).tobytes()


def engine(step: StepCost = STEP_SECOND, kv_tokens: int = 1000, **settings: Any) -> Engine:
    """Return an engine with a cache of `kv_tokens`."""
    return Engine(EngineConfig(step=step, kv_tokens=kv_tokens, **settings))


def request(name: str, prompt: Sequence[int], max_new_tokens: int = 4, *, namespace: str = "") -> Request:
    """Return a request for exactly so many tokens."""
    return Request(
        request_id=RequestId(name),
        program_id=ProgramId(name),
        call_path=name,
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True),
        namespace=namespace,
    )


def output_of(name: str, output_len: int) -> TokenIds:
    """Return the tokens that a request generates, which are its own."""
    rng = random.Random(name)
    return token_ids(rng.randrange(1 << 30, (1 << 30) + 1000) for _ in range(output_len))


def submit(
    one: Engine,
    name: str,
    prompt: Sequence[int],
    output_len: int = 4,
    now: float = 0.0,
    *,
    namespace: str = "",
) -> None:
    """Let an engine have a request that generates `output_len` tokens."""
    asked = request(name, prompt, output_len, namespace=namespace)
    one.submit(asked, output_of(name, output_len), now)


def step(one: Engine, now: float, **limits: int) -> StepResult | None:
    """Run one iteration, or a stretch of decode steps; None when there is nothing to do."""
    if one.start(now, **limits) is None:
        return None
    return one.finish()


def steps(one: Engine, now: float = 0.0, **limits: int) -> Iterator[StepResult]:
    """Run until nothing is left, checking after every iteration, and yield what each has brought."""
    while result := step(one, now, **limits):
        one.check_invariants()
        now = result.ended_at
        yield result


def run(one: Engine, now: float = 0.0) -> list[Finished]:
    """Run until nothing is left, checking after every iteration; return what ended, in order."""
    return [finished for result in steps(one, now) for finished in result.finished]


def run_until(one: Engine, until: float, now: float = 0.0) -> list[Finished]:
    """Run single steps until the first that ends at `until` or later; return what ended, in order."""
    finished: list[Finished] = []
    for result in steps(one, now, max_decode_steps=1):
        finished += result.finished
        if result.ended_at >= until:
            break
    return finished


def cached_tokens(finished: Sequence[Finished]) -> dict[str, int]:
    """Return how much of each prompt was cached."""
    return {str(one.request_id): one.usage.cached_tokens for one in finished}
