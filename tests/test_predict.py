"""Predicting what a policy keeps of a plan's reuse."""

from pathlib import Path

import pytest

import preble_sgl as ps
from preble_sgl.core import WorkerId
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.predict import Prediction, WorkerSpec, predict
from tests.global_sched.stories import A6000_MISTRAL_7B


@ps.program
async def ask(s: ps.State, document: str, questions: list[str]) -> list[str]:
    s += ps.user(document)
    notes = await s.map(questions, lambda b, q: b.ask(ps.user(q), max_tokens=8))
    s += ps.user("Sum up.")
    await s.gen(max_tokens=8)
    return notes


ROWS = [{"document": f"{name} " * 300, "questions": ["a?", "b?", "c?"]} for name in ("red", "green", "blue")]


async def predicted(tiny_model: Path, policy: str, workers: int, kv_tokens: int = 65536) -> Prediction:
    plan = await ask.aplan(ROWS, fleet=ChatFormat.load(tiny_model))
    specs = [WorkerSpec(WorkerId(f"w{i}"), kv_tokens, 1, A6000_MISTRAL_7B) for i in range(workers)]
    return predict(plan, specs, policy)


async def test_on_one_worker_everything_reusable_is_reused(tiny_model: Path) -> None:
    plan = await ask.aplan(ROWS, fleet=ChatFormat.load(tiny_model))
    prediction = await predicted(tiny_model, "round_robin", 1)
    # All rows begin at once, and the few tokens in front of their documents are not worth waiting for.
    assert plan.reusable_tokens - 10 < prediction.cached_tokens <= plan.reusable_tokens
    assert prediction.prompt_tokens == plan.prompt_tokens
    assert prediction.calls == {"w0": 12}


@pytest.mark.parametrize("policy", ["preble_plan", "preble_e2", "sticky"])
async def test_policies_that_follow_the_document_keep_nearly_all_of_it(tiny_model: Path, policy: str) -> None:
    best = await predicted(tiny_model, policy, 1)
    kept = await predicted(tiny_model, policy, 2)
    spread = await predicted(tiny_model, "round_robin", 2)
    assert best.cached_tokens - kept.cached_tokens < 10  # the few tokens in front of the document
    assert spread.cached_tokens < 0.8 * kept.cached_tokens
    assert set(kept.calls) == {"w0", "w1"}


async def test_a_prediction_is_the_same_every_time(tiny_model: Path) -> None:
    assert await predicted(tiny_model, "power_of_two", 3) == await predicted(tiny_model, "power_of_two", 3)


async def test_a_small_cache_is_predicted_too(tiny_model: Path) -> None:
    roomy = await predicted(tiny_model, "preble_e2", 1)
    tight = await predicted(tiny_model, "preble_e2", 1, kv_tokens=700)
    assert tight.cached_tokens < roomy.cached_tokens


async def test_calls_know_how_many_others_come_before_them(tiny_model: Path) -> None:
    plan = await ask.aplan(ROWS[:1], fleet=ChatFormat.load(tiny_model))
    assert [call.depth for call in plan.calls] == [0, 0, 0, 1]


async def test_a_hint_says_what_a_run_holds_at_its_widest(tiny_model: Path) -> None:
    plan = await ask.aplan(ROWS[:1], fleet=ChatFormat.load(tiny_model))
    hint = plan.hint(0, plan.calls[0].request.program_id)
    computed = plan.prompt_tokens - plan.reusable_tokens
    assert hint.kv_tokens == computed + 4 * 8
    (prefix,) = hint.prefixes
    assert all(token >= 0 for token in prefix)
    assert len(prefix) > 300
