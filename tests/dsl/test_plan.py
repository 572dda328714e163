"""Reading programs before they run: exact counts, and an honest end where they cannot be read."""

import datetime
import random
import re

import pytest

import preble_sgl as ps
from preble_sgl.core import ProgramId, Request, SamplingParams, common_prefix_len, new_request_id, token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.holes import marker, split_markers
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.prefix_counts import new_ranges
from preble_sgl.dsl.tracer import Reading, TracedCall
from tests.fakes import FakeBackend


@ps.program
async def review(s: ps.State, text: str, topics: list[str]) -> str:
    s += ps.system("You review.") + ps.user(text)
    notes = await s.map(topics, lambda b, topic: b.ask(ps.user(f"On {topic}."), max_tokens=5))
    s += ps.user(" and ".join(notes))
    return await s.gen(max_tokens=7)


async def test_a_plan_has_the_calls_and_prompts_that_the_run_makes(backend: FakeBackend) -> None:
    @ps.program
    async def straight(s: ps.State, text: str) -> None:
        s += ps.user(text)
        await s.map(["a", "b"], lambda b, x: b.ask(ps.user(x)))

    rows = [{"text": "one"}, {"text": "two"}]
    plan = await straight.aplan(rows, fleet=backend.chat)
    await straight.amap(rows, fleet=backend, progress=False)
    assert sorted(call.request.prompt.tolist() for call in plan.calls) == sorted(
        request.prompt.tolist() for request in backend.requests
    )


async def test_generations_reappear_in_later_prompts_with_their_limit(chat: ChatFormat) -> None:
    plan = await review.aplan([{"text": "t", "topics": ["x", "y"]}], fleet=chat)
    first, second, verdict = plan.calls
    holes = [token for token in verdict.request.prompt if token < 0]
    assert holes == [*first.output, *second.output]
    assert len(first.output) == 5
    assert plan.traces[0].stopped_at is None


async def test_reuse_counts_every_shared_token_once(chat: ChatFormat) -> None:
    rows = [{"text": "long " * 50, "topics": ["x", "y", "z"]} for _ in range(2)]
    plan = await review.aplan(rows, fleet=chat)
    distinct = {call.request.prompt.tobytes() for call in plan.calls}
    assert len(plan.calls) == 8
    assert len(distinct) == 4  # the two rows are the same
    tree = plan.tree()
    assert plan.reusable_tokens == plan.prompt_tokens - _computed_one_by_one(plan.calls)
    assert [node.label.split()[0] for node in tree.children.values()] == ["system"]


def _computed_one_by_one(calls: tuple[TracedCall, ...]) -> int:
    """Count what a single cache computes, the plain way: longest common prefix with anything before."""
    seen: list[bytes] = []
    computed = 0
    for call in calls:
        key = call.request.prompt.tobytes()
        hit = max((common_prefix_len(key, other) for other in seen), default=0)
        computed += len(call.request.prompt) - min(hit, len(call.request.prompt) - 1)
        seen.append((call.request.prompt + call.output[:-1]).tobytes())
    return computed


@pytest.mark.parametrize("seed", range(20))
def test_reuse_equals_a_naive_count_on_random_prompts(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randint(1, 2) for _ in range(rng.randint(1, 8))] for _ in range(30)]
    calls = tuple(_call(prompt) for prompt in sorted(prompts))
    assert sum(len(new) for _, new in new_ranges(calls)) == _computed_one_by_one(calls)


def _call(prompt: list[int]) -> TracedCall:
    request = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=0),
    )
    return TracedCall(request, (), token_ids())


def test_a_scored_prompt_is_computed_from_where_scoring_starts() -> None:
    request = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=token_ids([1, 2, 3, 4, 5]),
        sampling=SamplingParams(max_new_tokens=0),
        score_from=3,
    )
    calls = (_call([1, 2, 3, 4, 5]), TracedCall(request, (), token_ids()))
    assert [len(new) for _, new in new_ranges(calls)] == [5, 3]


async def test_explain_prints_lengths_calls_and_reuse(chat: ChatFormat) -> None:
    plan = await review.aplan([{"text": "t", "topics": ["x", "y"]}], fleet=chat)
    text = plan.explain()
    system_len = plan.calls[0].segments[0].end
    assert text.startswith("review · 1 rows · 3 calls\n")
    assert f"reusable {plan.reusable_tokens:,} ({plan.reuse_rate:.0%})" in text
    line = next(line for line in text.splitlines() if line.lstrip().startswith("system test_plan.py:"))
    assert line.split()[2:] == [str(system_len), "1", "3", str(3 * system_len), str(2 * system_len)]


@pytest.mark.parametrize(
    "question",
    [
        lambda text: len(text),
        lambda text: list(text),
        lambda text: [part.upper() for part in text.split()],
        lambda text: int(text),
        lambda text: float(text),
        lambda text: text.find("x"),
        lambda text: {text: 1},
        lambda text: text in {"yes", "no"},
    ],
)
async def test_a_question_with_many_answers_ends_the_reading_at_its_line(chat: ChatFormat, question) -> None:  # type: ignore[no-untyped-def]
    @ps.program
    async def asks(s: ps.State) -> None:
        text = await s.ask(ps.user("Well?"), max_tokens=3)
        question(text)
        await s.ask(ps.user("never read"))

    plan = await asks.aplan([{}], fleet=chat)
    assert len(plan.calls) == 1
    assert plan.bounds.calls.upper is None
    stopped_at = str(plan.traces[0].stopped_at)
    assert re.match(r"test_plan\.py:\d+: depends on the .* of a generated text", stopped_at)
    assert f"read only up to {stopped_at} (1 rows)" in plan.explain()


async def test_a_library_that_chokes_on_a_hole_leaves_the_plan_open(chat: ChatFormat) -> None:
    @ps.program
    async def loads(s: ps.State) -> None:
        datetime.date.fromisoformat(await s.ask(ps.user("Which day?"), max_tokens=3))
        await s.ask(ps.user("never read"))

    plan = await loads.aplan([{}], fleet=chat)
    assert "ValueError" in str(plan.traces[0].stopped_at)
    assert (plan.bounds.calls.lower, plan.bounds.calls.upper) == (1, None)


async def test_a_body_that_raises_is_read_up_to_there(chat: ChatFormat) -> None:
    @ps.program
    async def broken(s: ps.State) -> None:
        await s.ask(ps.user("first"))
        raise ZeroDivisionError("on purpose")

    plan = await broken.aplan([{}], fleet=chat)
    assert len(plan.calls) == 1
    assert re.fullmatch(r"test_plan\.py:\d+: ZeroDivisionError: on purpose", str(plan.traces[0].stopped_at))


def test_markers_survive_joining_and_are_cut_out_again() -> None:
    text = f"a{marker(0)}b{marker(12)}{marker(3)}"
    assert split_markers(text) == ["a", 0, "b", 12, 3]


def test_an_empty_plan_explains_itself() -> None:
    plan = Plan("nothing", (Trace(0, (Reading((), (), ()),)),))
    assert plan.reuse_rate == 0.0
    assert "0 calls" in plan.explain()
