"""What a program can say beside text and `gen`."""

import orjson
import pytest
from pydantic import BaseModel

import preble_sgl as ps
from preble_sgl.core import common_prefix_len
from preble_sgl.dsl.chat import ChatFormat, _compile_template


class Verdict(BaseModel):
    score: int


async def test_result_generates_the_type_that_the_program_returns_and_subprograms_theirs() -> None:
    @ps.program
    async def inner(s: ps.State) -> list[int]:
        s += ps.user("Numbers?")
        numbers: list[int] = await s.result()
        return numbers

    @ps.program
    async def outer(s: ps.State) -> Verdict:
        assert await inner(s) == [1, 2]
        s += ps.user("Verdict?")
        verdict: Verdict = await s.result(max_tokens=50)
        return verdict

    backend = ps.ScriptedBackend({"outer/call0": [1, 2], "outer/call1": {"score": 3}})
    assert await outer.arun(backend) == Verdict(score=3)
    schemas = [orjson.loads(str(request.sampling.json_schema)) for request in backend.requests]
    assert [schema["type"] for schema in schemas] == ["array", "object"]


async def test_a_schema_as_a_dict_gives_plain_json() -> None:
    @ps.program
    async def asks(s: ps.State) -> object:
        s += ps.user("?")
        return await s.gen({"type": "object", "properties": {"a": {"type": "integer"}}})

    assert await asks.arun(ps.ScriptedBackend({"*": {"a": 1}})) == {"a": 1}
    with pytest.raises(ValueError, match="the JSON schema is not JSON"):
        ps.gen({"a": object()})


async def test_choices_constrain_the_text_and_are_checked() -> None:
    @ps.program
    async def asks(s: ps.State) -> str:
        return await s.ask(ps.user("?"), choices=["a.b", "c (d)"])

    backend = ps.ScriptedBackend({"*": "c (d)"})
    assert await asks.arun(backend) == "c (d)"
    assert backend.requests[0].sampling.regex == r"(a\.b|c \(d\))"
    with pytest.raises(ps.OutputError, match="none of the choices"):
        await asks.arun(ps.ScriptedBackend({"*": "c"}))
    with pytest.raises(ValueError, match="one of type, regex and choices"):
        ps.gen(choices=["a"], regex="a")


async def test_generate_tells_all_that_came_of_a_call() -> None:
    @ps.program
    async def asks(s: ps.State) -> ps.Generation[int]:
        s += ps.user("?")
        return await s.generate(int, logprobs=0)

    backend = ps.ScriptedBackend({"*": 42})
    done = await asks.arun(backend)
    assert (done.value, done.text, done.finish_reason) == (42, "42", "stop")
    assert done.usage == backend.completions[0].usage
    assert len(done.logprobs) == done.usage.output_tokens


async def test_a_choice_that_is_likely_anywhere_is_not_favoured_against_its_prior() -> None:
    def logprob(prompt: str, choice: str) -> float:
        likely_anyway = {"the": -1.0, "zebra": -8.0}[choice]
        return likely_anyway + (2.0 if choice == "zebra" and "stripes" in prompt else 0.0)

    @ps.program
    async def picks(s: ps.State, rule: str) -> ps.Selection:
        s += ps.user("What has stripes?")
        return await s.select(["the", "zebra"], rule=rule)  # type: ignore[arg-type]

    backend = ps.ScriptedBackend({}, logprobs=logprob)
    assert (await picks.arun(backend, "mean_logprob")).value == "the"
    by_prior = await picks.arun(backend, "vs_prior")
    assert (by_prior.value, by_prior.scores, by_prior.index) == ("zebra", (0.0, 2.0), 1)


async def test_few_shot_takes_the_first_k_in_order() -> None:
    demos = [("a", "1"), ("b", "2"), ("c", "3")]
    shots = ps.few_shot(demos, lambda demo: ps.user(demo[0]) + ps.assistant(demo[1]), k=2)
    assert [part.text for part in shots.parts] == ["a", "1", "b", "2"]
    with pytest.raises(ValueError, match="4 demonstrations asked for, but there are 3"):
        ps.few_shot(demos, lambda demo: ps.user(demo[0]), k=4)


async def test_hints_go_with_every_call_from_there_on_and_into_forks() -> None:
    @ps.program
    async def hints(s: ps.State) -> None:
        await s.ask(ps.user("one"))
        s.hint(priority=2, output_len=30)
        s.hint(priority=3)
        await s.map([0], lambda branch, _: branch.ask(ps.user("two")))

    backend = ps.ScriptedBackend({"*": "x"})
    await hints.arun(backend)
    assert [(r.priority, r.expected_output_len) for r in backend.requests] == [(0, None), (3, 30)]


async def test_a_sub_branch_begins_with_nothing_and_belongs_to_the_run() -> None:
    @ps.program
    async def nests(s: ps.State) -> None:
        s += ps.system("outer")
        branch = s.sub(name="expert")
        branch += ps.system("inner")
        await branch.ask(ps.user("?"))

    backend = ps.ScriptedBackend({"*": "x"})
    await nests.arun(backend)
    (request,) = backend.requests
    assert [message["content"] for message in request.messages] == ["inner", "?"]
    assert request.call_path == "nests/expert/call0"


async def test_names_that_repeat_are_numbered() -> None:
    @ps.program
    async def repeats(s: ps.State) -> None:
        for _ in range(2):
            await s.ask(ps.user("?"), name="step")
            await s.map([0, 1], lambda branch, _: branch.ask(ps.user("?")), name="try")

    backend = ps.ScriptedBackend({"*": "x"})
    await repeats.arun(backend)
    assert backend.calls == [
        "repeats/step",
        "repeats/try.0/call0",
        "repeats/try.1/call0",
        "repeats/step1",
        "repeats/try1.0/call0",
        "repeats/try1.1/call0",
    ]


SHOWS_IMAGES = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@ps.program
async def looks(s: ps.State, image: str) -> str:
    s += ps.system("You describe pictures.")
    return await s.ask(ps.user("What is it?", images=[image]))


async def test_images_are_sent_as_text_and_shared_only_if_they_are_the_same() -> None:
    plain = ChatFormat.of_bytes()
    backend = ps.ScriptedBackend(
        {"*": "x"}, chat=ChatFormat(plain._tokenizer, _compile_template(SHOWS_IMAGES), {})
    )
    for image in ("cat.png", "dog.png", "cat.png"):
        await looks.arun(backend, image)
    cat, dog, again = backend.requests
    assert cat.images == ("cat.png",)
    assert cat.text == ("<system>You describe pictures.</system><user><image>What is it?</user><assistant>")
    system_len = len("<system>You describe pictures.</system>")
    assert common_prefix_len(cat.prompt.tobytes(), dog.prompt.tobytes()) == system_len
    assert again.prompt == cat.prompt


async def test_a_template_without_images_says_so() -> None:
    with pytest.raises(ps.InputError, match="takes no images"):
        await looks.arun(ps.ScriptedBackend({"*": "x"}), "cat.png")


async def test_pauses_reach_the_scheduler() -> None:
    @ps.program
    async def waits(s: ps.State) -> None:
        s.pause(7.5)

    backend = ps.ScriptedBackend({})
    await waits.arun(backend)
    assert backend.pauses == [7.5]
