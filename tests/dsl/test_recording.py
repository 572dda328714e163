"""Programs recorded once and replayed: the same results, and a readable account of what is not the same."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

import preble_sgl as ps
from preble_sgl.core import Request, Usage
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.recording import record, replay
from preble_sgl.dsl.scripted import ScriptedBackend

ROWS = [{"document": "All cats are grey.\nSo are mice."}, {"document": "Dogs are loud."}]


class Verdict(BaseModel):
    score: int
    reason: str


@ps.program
async def review(s: ps.State, document: str, instruction: str = "Be strict.") -> Verdict:
    s += ps.system(f"You review.\n{instruction}\nThank you.") + ps.user(document)
    notes = await s.map(
        ["style", "facts"], lambda b, d: b.ask(ps.user(d), temperature=0.7, max_tokens=20), name="notes"
    )
    choice = await s.select(["good", "bad"], name="choice", rule="vs_prior")
    s += ps.user(f"{notes} {choice.value}")
    return await s.gen(Verdict, name="verdict")


@ps.program
async def say(s: ps.State, /, **options: Any) -> ps.Generation[str]:
    s += "Once upon a time"
    return await s.generate(**options)


@ps.program
async def choose(s: ps.State, choices: list[str]) -> str:
    s += ps.user("Choose.")
    return (await s.select(choices)).value


@pytest.fixture
def cassette(tmp_path: Path) -> Path:
    return tmp_path / "cassette.jsonl"


@pytest.fixture
def model() -> ScriptedBackend:
    """What stands for a model: it says something else in each row."""

    def script(request: Request, prompt: str) -> object:
        if request.score_from is not None:
            return "bad"
        if request.sampling.json_schema is not None:
            return Verdict(score=len(request.prompt), reason=request.call_path)
        return f"It is {len(prompt)} long."

    return ScriptedBackend(script)


def lines(cassette: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in cassette.read_bytes().splitlines()]


def test_a_replayed_batch_is_the_recorded_one(model: ScriptedBackend, cassette: Path) -> None:
    with record(model, cassette) as backend:
        recorded = review.map(ROWS, fleet=backend, progress=False)
    replayed = review.map(ROWS, fleet=replay(cassette), progress=False)
    assert [row.ok for row in replayed] == [True, True]
    assert {row.num_calls for row in replayed} == {7}
    assert replayed == recorded
    assert len(lines(cassette)) == 14
    assert [hint.program_id for hint in model.hints] == model.ended
    assert len(model.given_back) == 4


def test_a_recording_says_what_was_asked_and_answered(model: ScriptedBackend, cassette: Path) -> None:
    with record(model, cassette) as backend:
        say.run(backend, max_tokens=4, stop=["z"], logprobs=1)
    (line,) = lines(cassette)
    assert {**line, "ids_hash": len(line["ids_hash"])} == {
        "call_path": "say/call0",
        "prompt": "Once upon a time",
        "messages": [],
        "sampling": {"max_new_tokens": 4, "stop": ["z"]},
        "ids_hash": 32,
        "score_from": None,
        "num_top_logprobs": 1,
        "answer": {
            "text": "It i",
            "output_ids": list(b"It i"),
            "finish_reason": "length",
            "usage": {"prompt_tokens": 16, "cached_tokens": 0, "output_tokens": 4},
            "logprobs": [],
            "output_logprobs": [{"token_id": i, "logprob": -0.1, "top": [[i, -0.1]]} for i in b"It i"],
        },
    }


def test_all_that_came_of_a_call_is_replayed(cassette: Path) -> None:
    scores = {"never": float("-inf"), "maybe": -0.123456789012345}
    with record(
        ScriptedBackend({"*": "fine"}, logprobs=lambda _, choice: scores[choice]), cassette
    ) as backend:
        said = say.run(backend, logprobs=1)
        chosen = choose.run(backend, ["never", "maybe"])
    again = replay(cassette)
    assert say.run(again, logprobs=1) == said
    assert len(said.logprobs) == 5
    assert choose.run(again, ["never", "maybe"]) == chosen == "maybe"
    assert lines(cassette)[1]["answer"]["logprobs"] == ["-Infinity"] * 5


def test_equal_calls_are_answered_in_their_order_and_the_last_answer_stays(cassette: Path) -> None:
    with record(ScriptedBackend({"*": iter(["one", "two"])}), cassette) as backend:
        assert [say.run(backend).text for _ in range(2)] == ["one", "two"]
    again = replay(cassette)
    assert [say.run(again).text for _ in range(3)] == ["one", "two", "two"]
    assert say.run(again).usage == Usage(16, 15, 4)


def test_a_recording_is_made_anew(model: ScriptedBackend, cassette: Path) -> None:
    for _ in range(2):
        with record(model, cassette) as backend:
            say.run(backend)
    assert len(lines(cassette)) == 1


def test_a_recording_can_be_read_while_it_is_made(model: ScriptedBackend, cassette: Path) -> None:
    with record(model, cassette) as backend:
        say.run(backend)
        assert say.run(replay(cassette)).text == "It is 16 long."


def test_what_a_stream_says_is_replayed_as_a_stream(model: ScriptedBackend, cassette: Path) -> None:
    async def pieces(backend: Any) -> list[str]:
        return [e.text async for e in say.astream(backend) if isinstance(e, ps.TextDelta)]

    with record(model, cassette) as backend:
        assert asyncio.run(pieces(backend)) == ["It ", "is ", "16 ", "long."]
    assert asyncio.run(pieces(replay(cassette))) == ["It ", "is ", "16 ", "long."]


def test_it_runs_where_a_loop_runs_already_as_in_a_notebook(model: ScriptedBackend, cassette: Path) -> None:
    async def main() -> ps.Generation[str]:
        with record(model, cassette) as backend:
            recorded = say.run(backend)
        assert say.run(replay(cassette)) == recorded
        return recorded

    assert asyncio.run(main()).text == "It is 16 long."


def test_calls_that_fail_are_passed_on_and_not_recorded(cassette: Path) -> None:
    broken = ScriptedBackend({"*/notes.1/*": ps.RuntimeLost("gone"), "*": "x"})
    with record(broken, cassette) as backend, pytest.raises(ps.RuntimeLost, match="gone"):
        review.run(backend, "Cats.")
    assert {line["call_path"] for line in lines(cassette)} == {"review/notes.0/call0"}


def test_a_changed_prompt_is_refused_with_a_diff_from_the_first_message_that_differs(
    model: ScriptedBackend, cassette: Path
) -> None:
    with record(model, cassette) as backend:
        review.map(ROWS, fleet=backend, progress=False)
    changed = [row | {"instruction": "Be lenient."} for row in ROWS]
    batch = review.map(changed, fleet=replay(cassette), progress=False)
    error = batch[1].error
    assert isinstance(error, ps.ReplayMiss)
    assert error.call_path == "review[1]/notes.0/call0"
    assert str(error) == (
        "call review[1]/notes.0/call0 is not in the recording: "
        "the prompt of review[1]/notes.0/call0, which is nearest, differs\n"
        "--- recorded\n"
        "+++ asked\n"
        "@@ -1,6 +1,6 @@\n"
        " system:\n"
        " You review.\n"
        "-Be strict.\n"
        "+Be lenient.\n"
        " Thank you.\n"
        " user:\n"
        " Dogs are loud."
    )


def test_messages_that_are_the_same_are_not_shown(model: ScriptedBackend, cassette: Path) -> None:
    with record(model, cassette) as backend:
        review.run(backend, "Cats are grey.")
    with pytest.raises(ps.ReplayMiss) as caught:
        review.run(replay(cassette), "Cats are black.")
    assert str(caught.value).splitlines()[3:] == [
        "@@ -1,4 +1,4 @@",
        " user:",
        "-Cats are grey.",
        "+Cats are black.",
        " user:",
        " style",
    ]


def test_the_nearest_recording_is_of_the_same_call_or_else_begins_most_alike(cassette: Path) -> None:
    @ps.program
    async def two(s: ps.State, first: str, second: str) -> None:
        for name, text in (("a", first), ("b", second)):
            await s.sub(name=name).ask(ps.user(text))

    with record(ScriptedBackend({"*": "x"}), cassette) as backend:
        two.map(
            [{"first": "red", "second": "blue"}, {"first": "rose", "second": "black"}],
            fleet=backend,
            progress=False,
        )
    again = replay(cassette)
    with pytest.raises(ps.ReplayMiss, match=r"the prompt of two\[1\]/a/call0, which is nearest"):
        two.run(again, "rosy", "blue")
    with pytest.raises(ps.ReplayMiss, match=r"the prompt of two\[0\]/b/call0, which is nearest"):
        two.run(again, "red", "rot")

    @ps.program
    async def other(s: ps.State) -> None:
        await s.ask(ps.user("blu"))

    with pytest.raises(ps.ReplayMiss, match=r"the prompt of two\[0\]/b/call0, which is nearest"):
        other.run(again)


def test_a_diff_is_short_whatever_the_prompts(cassette: Path) -> None:
    @ps.program
    async def read(s: ps.State, text: str) -> str:
        return await s.ask(ps.user(text))

    with record(ScriptedBackend({"*": "x"}), cassette) as backend:
        read.run(backend, "\n".join(f"line {i}" for i in range(1000)))
        read.run(backend, "x" * 250)
    again = replay(cassette)
    with pytest.raises(ps.ReplayMiss) as caught:
        read.run(again, "\n".join(f"line {2 * i}" for i in range(1000)))
    assert len(str(caught.value).splitlines()) == 21
    with pytest.raises(ps.ReplayMiss) as caught:
        read.run(again, "x" * 249 + "y")
    assert str(caught.value).splitlines()[-2:] == ["-" + "x" * 50, "+" + "x" * 49 + "y"]


def test_choices_that_were_not_recorded_are_shown_as_text(model: ScriptedBackend, cassette: Path) -> None:
    with record(model, cassette) as backend:
        choose.run(backend, ["good", "bad"])
    with pytest.raises(ps.ReplayMiss) as caught:
        choose.run(replay(cassette), ["great", "bad"])
    assert str(caught.value).splitlines()[-2:] == ["-good", "+great"]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"max_tokens": 9}, "max_new_tokens was 8 and is 9"),
        ({"max_tokens": 8, "stop": "a"}, "stop was () and is ('a',)"),
        (
            {"max_tokens": 8, "temperature": 0.5, "seed": 3},
            "temperature was 0.0 and is 0.5, seed was None and is 3",
        ),
        ({"max_tokens": 8, "logprobs": 2}, "num_top_logprobs was None and is 2"),
    ],
)
def test_a_call_that_is_only_sampled_differently_is_refused_with_the_difference(
    model: ScriptedBackend, cassette: Path, options: Mapping[str, Any], difference: str
) -> None:
    with record(model, cassette) as backend:
        say.run(backend, max_tokens=8)
        say.run(backend, max_tokens=2, top_p=0.5, seed=4)
    with pytest.raises(ps.ReplayMiss) as caught:
        say.run(replay(cassette), **options)
    assert str(caught.value) == (
        f"call say/call0 is not in the recording: its prompt is, but only the sampling differs: {difference}"
    )


def test_another_models_tokens_are_told_from_another_text(
    model: ScriptedBackend, cassette: Path, chat: ChatFormat
) -> None:
    with record(model, cassette) as backend:
        say.run(backend)
    with pytest.raises(
        ps.ReplayMiss, match=r"the text of say/call0 is the same, but not its tokens; give the"
    ):
        say.run(replay(cassette, chat=chat))


def test_a_models_own_chat_format_is_recorded_and_replayed(cassette: Path, chat: ChatFormat) -> None:
    with record(ScriptedBackend({"*": "fine"}, chat=chat), cassette) as backend:
        recorded = say.run(backend)
    assert say.run(replay(cassette, chat=chat)) == recorded


def test_an_empty_recording_has_no_answer(cassette: Path) -> None:
    cassette.touch()
    with pytest.raises(ps.ReplayMiss, match="call say/call0 is not in the recording: it is empty"):
        say.run(replay(cassette))


def test_a_file_that_cannot_be_used_is_named(model: ScriptedBackend, tmp_path: Path, cassette: Path) -> None:
    missing = tmp_path / "missing" / "cassette.jsonl"
    with (
        pytest.raises(ps.InputError, match=r"missing/cassette.jsonl: cannot be written \(No such file"),
        record(model, missing),
    ):
        pass
    with pytest.raises(ps.InputError, match=r"cannot be read \(No such file or directory\); make it with"):
        replay(missing)
    with record(model, cassette) as backend:
        say.run(backend)
    whole = cassette.read_bytes()
    cassette.write_bytes(whole + whole[:40])
    with pytest.raises(ps.InputError, match=r"cassette.jsonl, line 2: line: Invalid JSON.*; record it anew$"):
        replay(cassette)
    cassette.write_bytes(whole.replace(b'"text"', b'"test"'))
    with pytest.raises(ps.InputError, match=r"cassette.jsonl, line 1: answer.text: Field required; record"):
        replay(cassette)
