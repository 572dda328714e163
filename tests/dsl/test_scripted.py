"""Programs against a script: what they are answered, what it costs, and what a script that is wrong says."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import BaseModel

import preble_sgl as ps
from preble_sgl.core import (
    Chunk,
    Completion,
    ProgramId,
    Request,
    RequestId,
    TokenIds,
    TokenLogprob,
    Usage,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.scripted import LEAST, PrefixSet, ScriptedBackend, stream_out, without_row

DIMENSIONS = ["style", "facts"]


class Verdict(BaseModel):
    score: int
    decision: Literal["accept", "reject"]


@dataclass
class Point:
    x: int
    y: int


@ps.program
async def judge(s: ps.State, article: str) -> Verdict:
    s += ps.system("You grade articles.") + ps.user(article)
    notes = await s.map(DIMENSIONS, lambda b, d: b.ask(ps.user(d), max_tokens=20), name="notes")
    s += ps.user(" and ".join(notes))
    return await s.gen(Verdict, name="verdict", max_tokens=80)


@ps.program
async def say(s: ps.State, /, **options: Any) -> ps.Generation[str]:
    s += ps.user("Speak.")
    return await s.generate(**options)


@ps.program
async def talk(s: ps.State) -> list[str]:
    return [await s.ask(ps.user(f"Question {i}.")) for i in range(3)]


@ps.program
async def pick(s: ps.State, rule: Literal["mean_logprob", "sum_logprob", "vs_prior"]) -> ps.Selection:
    s += ps.user("Left or right?")
    return await s.select(["left", "right"], rule=rule)


def request(text: str, **more: Any) -> Request:
    return Request(
        request_id=RequestId("1"),
        program_id=ProgramId("p"),
        call_path="say/call0",
        prompt=token_ids(list(text.encode())),
        **more,
    )


def test_a_program_gets_the_answers_of_the_first_patterns_that_fit() -> None:
    script = {
        "judge/notes.1/*": "sound",
        "*/notes.*": "lively",
        "*/verdict": Verdict(score=4, decision="accept"),
    }
    backend = ScriptedBackend(script)
    assert judge.run(backend, "Cats.") == Verdict(score=4, decision="accept")
    assert backend.calls == ["judge/notes.0/call0", "judge/notes.1/call0", "judge/verdict"]
    assert [done.text for done in backend.completions[:2]] == ["lively", "sound"]
    assert "lively and sound" in backend.chat.decode(backend.requests[2].prompt)


def test_a_batch_needs_no_rows_in_its_patterns() -> None:
    backend = ScriptedBackend({"judge/notes.?/call0": "fine", "judge/verdict": LEAST})
    batch = judge.map([{"article": "a"}, {"article": "b"}], fleet=backend, progress=False)
    assert batch.values == [Verdict(score=0, decision="accept")] * 2
    assert sorted(backend.calls)[:3] == [
        "judge[0]/notes.0/call0",
        "judge[0]/notes.1/call0",
        "judge[0]/verdict",
    ]
    assert (len(backend.hints), len(backend.ended)) == (2, 2)


def test_only_the_row_is_taken_from_a_path() -> None:
    assert without_row("judge[31]/a[2]/call0") == "judge/a[2]/call0"
    assert without_row("judge/notes.1/call0") == "judge/notes.1/call0"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("as it is", "as it is"),
        (Verdict(score=1, decision="reject"), '{"score":1,"decision":"reject"}'),
        (Point(1, 2), '{"x":1,"y":2}'),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ([1, 2], "[1,2]"),
        (7, "7"),
        (True, "true"),
        (None, "null"),
        (iter(["first"]), "first"),
        (lambda prompt: [prompt[-10:]], '["assistant\\n"]'),
        (LEAST, "x"),
    ],
)
def test_an_answer_is_a_text_or_becomes_one(answer: object, text: str) -> None:
    assert say.run(ScriptedBackend({"*": answer})).text == text


def test_an_iterator_gives_each_call_its_next_answer_and_says_when_it_has_none() -> None:
    assert talk.run(ScriptedBackend({"*": iter(["one", 2, lambda prompt: "three"])})) == ["one", "2", "three"]
    with pytest.raises(ps.PrebleError, match=r'^call talk/call2: "talk/\*" has no more answers') as caught:
        talk.run(ScriptedBackend({"talk/*": iter(["one", "two"])}))
    assert caught.value.call_path == "talk/call2"


def test_a_function_may_be_the_whole_script() -> None:
    def script(request: Request, prompt: str) -> object:
        return f"{request.call_path}: {prompt.count('Question')}" if "Question 2" not in prompt else None

    backend = ScriptedBackend(script)
    message = "call talk/call2: the script has no answer to it. The prompt ends in '.*Question 2.assistant"
    with pytest.raises(ps.RequestRejected, match=message):
        talk.run(backend)
    assert [done.text for done in backend.completions] == ["talk/call0: 1", "talk/call1: 2"]


def test_a_scripted_error_is_raised_anew_in_each_row() -> None:
    lost = ps.RuntimeLost("worker 3 is gone")
    rows = [{"article": "a"}, {"article": "b"}]
    batch = judge.map(rows, fleet=ScriptedBackend({"*/notes.1/*": lost, "*": LEAST}), progress=False)
    assert [type(row.error) for row in batch] == [ps.RuntimeLost] * 2
    assert [row.error.call_path for row in batch if isinstance(row.error, ps.RuntimeLost)] == [
        "judge[0]/notes.1/call0",
        "judge[1]/notes.1/call0",
    ]
    assert lost.call_path is None
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        talk.run(ScriptedBackend({"*": ZeroDivisionError("on purpose")}))


def test_a_retry_goes_on_with_the_next_answer() -> None:
    backend = ScriptedBackend(
        {"*": iter([ps.RuntimeLost("gone"), '{"score": 1', Verdict(score=1, decision="accept")])}
    )

    @ps.program
    async def grade(s: ps.State) -> Verdict:
        return await s.ask(ps.user("Grade."), Verdict)

    assert grade.using(retry=ps.Retry(3, backoff_s=0)).run(backend) == Verdict(score=1, decision="accept")
    assert backend.calls == ["grade/call0"] * 3


def test_a_call_that_no_pattern_fits_is_refused_with_all_one_needs_to_know() -> None:
    backend = ScriptedBackend({"judge/notes.*": "fine", "other/*": "x"})
    with pytest.raises(ps.RequestRejected) as caught:
        judge.run(backend, "word " * 100)
    shown = backend.chat.decode(backend.requests[2].prompt)[-200:]
    assert shown.endswith("word user\nfine and fineassistant\n")
    assert str(caught.value) == (
        'call judge/verdict: the script has no answer to it; its patterns are "judge/notes.*", "other/*". '
        f"The prompt ends in {shown!r}"
    )
    assert caught.value.call_path == "judge/verdict"


def test_what_cannot_be_a_script_or_an_answer_is_said() -> None:
    with pytest.raises(ps.InputError, match="a script is a dict"):
        ScriptedBackend("fine")  # type: ignore[arg-type]
    with pytest.raises(
        ps.InputError, match=r'call say/call0: "\*" has an answer of type object, which is not JSON'
    ):
        say.run(ScriptedBackend({"*": object()}))
    with pytest.raises(ps.InputError, match="LEAST cannot answer a regex or choices: script a text"):
        say.run(ScriptedBackend({"*": LEAST}), choices=["a", "b"])


@pytest.mark.parametrize(
    ("options", "text", "ids", "finish_reason"),
    [
        ({}, "ab, cd", b"ab, cd\x03", "stop"),
        ({"max_tokens": 6}, "ab, cd", b"ab, cd", "stop"),
        ({"max_tokens": 5}, "ab, c", b"ab, c", "length"),
        ({"max_tokens": 0}, "", b"", "length"),
        ({"stop": ["d", ", "]}, "ab", b"ab, ", "stop"),
        ({"stop": "z"}, "ab, cd", b"ab, cd\x03", "stop"),
        ({"stop": ", ", "max_tokens": 3}, "ab,", b"ab,", "length"),
        ({"ignore_eos": True, "max_tokens": 15}, "ab, cdab, cdab,", b"ab, cdab, cdab,", "length"),
        ({"ignore_eos": True, "max_tokens": 2}, "ab", b"ab", "length"),
    ],
)
def test_an_answer_ends_as_a_runtime_would_end_it(
    options: dict[str, Any], text: str, ids: bytes, finish_reason: str
) -> None:
    backend = ScriptedBackend({"*": "ab, cd"})
    generation = say.run(backend, **options)
    assert (generation.text, generation.finish_reason) == (text, finish_reason)
    assert bytes(backend.completions[0].output_ids.tolist()) == ids
    assert generation.usage.output_tokens == len(ids)


def test_an_empty_answer_is_repeated_as_something() -> None:
    assert say.run(ScriptedBackend({"*": ""}), ignore_eos=True, max_tokens=3).text == "xxx"


def test_a_models_own_chat_format_is_used_if_given(chat: ChatFormat) -> None:
    backend = ScriptedBackend({"*": "Certainly, my dear friend."}, chat=chat)
    generation = say.run(backend, max_tokens=64)
    assert generation.text == "Certainly, my dear friend."
    end = chat.encode(chat.assistant_end)[:1]
    assert backend.completions[0].output_ids == chat.encode("Certainly, my dear friend.") + end
    assert say.run(backend, max_tokens=2).usage.output_tokens == 2


def test_log_probabilities_are_reported_if_asked_for() -> None:
    backend = ScriptedBackend({"*": "a"})
    assert say.run(backend, logprobs=1).logprobs == (
        TokenLogprob(97, -0.1, ((97, -0.1),)),
        TokenLogprob(3, -0.1, ((3, -0.1),)),
    )
    assert say.run(backend).logprobs == ()


@pytest.mark.parametrize(
    ("rule", "scores"),
    [("mean_logprob", (-1.0, -0.1)), ("sum_logprob", (-4.0, -0.5)), ("vs_prior", (0.0, 0.9))],
)
def test_a_select_takes_the_choice_in_the_script_by_every_rule(
    rule: Any, scores: tuple[float, float]
) -> None:
    selection = pick.run(ScriptedBackend({"pick/call0": "right"}), rule=rule)
    assert selection.value == "right"
    assert selection.scores == pytest.approx(scores)


@pytest.mark.parametrize("script", [{}, {"*": "up"}, {"*": LEAST}])
def test_a_select_takes_the_first_choice_if_the_script_takes_none(script: dict[str, object]) -> None:
    assert pick.run(ScriptedBackend(script), rule="mean_logprob") == ps.Selection(
        "left", ("left", "right"), (-1.0, -1.0)
    )


def test_a_select_asks_the_script_once_for_all_its_choices() -> None:
    @ps.program
    async def twice(s: ps.State) -> list[str]:
        s += ps.user("Left or right?")
        return [(await s.select(["left", "right", "on"], name="way")).value for _ in range(2)]

    backend = ScriptedBackend({"*/way*": iter(["on", lambda prompt: prompt.split("assistant\n")[1][:2]])})
    assert twice.run(backend) == ["on", "on"]
    assert backend.calls[-1] == "twice/way1:2"


def test_log_probabilities_of_choices_may_be_given() -> None:
    seen: list[tuple[str, str]] = []

    def logprobs(prompt: str, choice: str) -> float:
        seen.append((prompt, choice))
        return -0.25 if choice == "left" and "Left" in prompt else -0.5

    selection = pick.run(ScriptedBackend({}, logprobs=logprobs), rule="vs_prior")
    assert selection == ps.Selection("left", ("left", "right"), (0.25, 0.0))
    before = "user\nLeft or right?assistant\n"
    assert seen == [(before, "left"), (before, "right"), ("assistant\n", "left"), ("assistant\n", "right")]


def test_a_select_may_fail() -> None:
    with pytest.raises(ps.RuntimeLost, match="gone"):
        pick.run(ScriptedBackend({"*": ps.RuntimeLost("gone")}), rule="mean_logprob")


async def test_cached_tokens_are_those_of_a_cache_that_never_forgets() -> None:
    backend = ScriptedBackend({"*": "abc"})
    done = [
        await backend.generate(request("12345")),  # nothing is known
        await backend.generate(request("12345")),  # all but the token that must be computed
        await backend.generate(request("12345abc!")),  # the output too, but for its end
        await backend.generate(request("12345abc\x03!")),
        await backend.generate(request("12345abc", score_from=5)),
        await backend.generate(request("12345abc", namespace="other")),
    ]
    assert [one.usage.cached_tokens for one in done] == [0, 4, 8, 8, 4, 0]
    assert done[4].usage == Usage(8, 4, 0)
    assert done[4].logprobs == (-0.1,) * 3


def test_what_runs_at_the_same_time_shares_a_prefix_as_well() -> None:
    backend = ScriptedBackend({"*": LEAST})
    judge.run(backend, "A long article.")
    first, second, verdict = (done.usage for done in backend.completions)
    shared = len(b"\x02system\nYou grade articles.\x03\x02user\nA long article.\x03\x02user\n")
    assert (first.cached_tokens, second.cached_tokens) == (0, shared)
    assert (verdict.prompt_tokens, verdict.cached_tokens) == (
        shared + len(b"x and x\x03\x02assistant\n"),
        shared,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_prefix_set_finds_what_comparing_with_all_would_find(seed: int) -> None:
    rng = random.Random(seed)
    prefixes, known = PrefixSet(), list[TokenIds]()
    for _ in range(200):
        ids = token_ids(rng.choices([0, 1, 255, 256, 1 << 30], k=rng.randrange(12)))
        assert prefixes.match_len(ids) == max((shared_len(ids, other) for other in known), default=0)
        if rng.random() < 0.5:
            prefixes.add(ids)
            known.append(ids)
            prefixes.check_invariants()
    assert len(prefixes) == sum(1 for one in {bytes(ids) for ids in known} if not begins_another(one, known))


def shared_len(a: TokenIds, b: TokenIds) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def begins_another(one: bytes, known: list[TokenIds]) -> bool:
    return any(bytes(other) != one and bytes(other).startswith(one) for other in known)


async def test_an_answer_comes_word_by_word() -> None:
    backend = ScriptedBackend({"*": " To be  or\nnot"})
    events = [event async for event in say.astream(backend)]
    assert [e.text for e in events if isinstance(e, ps.TextDelta)] == [" ", "To ", "be  ", "or\n", "not"]
    assert isinstance(events[-1], ps.RunEnded)
    assert events[-1].value.text == " To be  or\nnot"


@pytest.mark.parametrize("text", ["", "a", "one two three", "  "])
async def test_the_chunks_of_an_answer_are_the_answer(text: str) -> None:
    chunks: list[Chunk] = []
    done = Completion(token_ids(range(7)), text, "stop", Usage(3, 1, 7))
    await stream_out(done, lambda chunk, attempt: chunks.append(chunk))
    assert "".join(chunk.text for chunk in chunks) == text
    assert sum((chunk.output_ids for chunk in chunks), token_ids()) == done.output_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].usage == done.usage


async def test_leaving_a_stream_early_ends_the_program() -> None:
    backend = ScriptedBackend({"*": "many words that nobody waits for"})
    async for event in talk.astream(backend):
        if isinstance(event, ps.TextDelta):
            break
    await asyncio.sleep(0.01)
    assert backend.calls == ["talk/call0"]
    assert backend.completions == []


def test_a_program_runs_where_a_loop_runs_already_as_in_a_notebook() -> None:
    backend = ScriptedBackend({"*": LEAST})

    async def main() -> Verdict:
        return judge.run(backend, "Cats.")

    assert asyncio.run(main()) == Verdict(score=0, decision="accept")
    assert len(judge.plan([{"article": "Cats."}], fleet=backend).calls) == 3


def test_pauses_and_what_is_given_back_are_remembered() -> None:
    @ps.program
    async def wait(s: ps.State) -> None:
        s += ps.user("Wait.")
        await s.map(["a", "b"], lambda b, text: b.ask(ps.user(text)))
        s.pause(2.5)

    backend = ScriptedBackend({"*": "ok"})
    wait.run(backend)
    assert backend.pauses == [2.5]
    assert backend.given_back == [len(b"\x02user\na\x03\x02assistant\nok\x03")] * 2
    assert [hint.program_id for hint in backend.hints] == backend.ended
