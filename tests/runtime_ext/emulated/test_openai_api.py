"""The OpenAI endpoints, with OpenAI's own client."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from preble_sgl.runtime_ext.emulated.text import ModelCodec
from tests.runtime_ext.emulated.runtimes import Emulated, config, running

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def client(emulated: Emulated) -> Any:
    return openai.AsyncOpenAI(base_url=f"{emulated.url}/v1", api_key="none", max_retries=0)


async def test_a_chat_is_answered_and_its_usage_tells_what_was_cached(quick: Emulated) -> None:
    async with client(quick) as api:
        first = await api.chat.completions.create(model="m", messages=QUESTION, max_tokens=6)
        again = await api.chat.completions.create(model="m", messages=QUESTION, max_completion_tokens=6)
    type(first).model_validate(first.model_dump())
    (choice,) = first.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert len(choice.message.content.split()) == 6
    assert (first.model, first.object, first.usage.completion_tokens) == ("m", "chat.completion", 6)
    assert first.usage.total_tokens == first.usage.prompt_tokens + 6
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    assert again.choices[0].message.content == choice.message.content


async def test_a_streamed_chat_adds_up_to_the_whole_one(quick: Emulated) -> None:
    async with client(quick) as api:
        whole = await api.chat.completions.create(model="m", messages=QUESTION, max_tokens=6)
        options = {"include_usage": True}
        stream = await api.chat.completions.create(
            model="m", messages=QUESTION, max_tokens=6, stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
    *pieces, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    reasons = [piece.choices[0].finish_reason for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + ["length"]
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


async def test_without_the_option_a_stream_has_no_usage(quick: Emulated) -> None:
    async with client(quick) as api:
        stream = await api.chat.completions.create(model="m", messages=QUESTION, max_tokens=2, stream=True)
        assert [chunk.usage async for chunk in stream if chunk.usage] == []


async def test_completions_take_text_ids_and_lists(quick: Emulated) -> None:
    async with client(quick) as api:
        text = await api.completions.create(model="m", prompt="hello there", max_tokens=3)
        ids = await api.completions.create(model="m", prompt=[5, 6, 7])
        both = await api.completions.create(model="m", prompt=["hello there", "you"], max_tokens=3)
    type(text).model_validate(text.model_dump())
    assert (text.object, text.choices[0].finish_reason) == ("text_completion", "length")
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 16)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text.choices[0].text
    assert both.usage.completion_tokens == 6


async def test_a_streamed_completion_adds_up_to_the_whole_one(quick: Emulated) -> None:
    async with client(quick) as api:
        whole = await api.completions.create(model="m", prompt="hello", max_tokens=9)
        stream = await api.completions.create(model="m", prompt="hello", max_tokens=9, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


async def test_the_client_that_is_not_async_works_too(quick: Emulated) -> None:
    def chat() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{quick.url}/v1", api_key="none", max_retries=0) as api:
            whole = api.chat.completions.create(model="m", messages=QUESTION, max_tokens=5)
            stream = api.chat.completions.create(model="m", messages=QUESTION, max_tokens=5, stream=True)
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
            assert [model.id for model in api.models.list()] == ["emulated/test"]
            return whole.choices[0].message.content, "".join(parts)

    whole, streamed = await asyncio.to_thread(chat)
    assert whole == streamed


async def test_a_conversation_sent_back_as_text_is_found_in_the_cache(quick: Emulated) -> None:
    async with client(quick) as api:
        first = await api.chat.completions.create(model="m", messages=QUESTION, max_tokens=30)
        answer = {"role": "assistant", "content": first.choices[0].message.content}
        messages = [*QUESTION, answer, {"role": "user", "content": "And of Spain?"}]
        second = await api.chat.completions.create(model="m", messages=messages, max_tokens=1)
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == known


async def test_content_may_come_in_parts_and_tools_are_part_of_the_prompt(quick: Emulated) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]}
    ]
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    async with client(quick) as api:
        joined = await api.chat.completions.create(model="m", messages=parts, max_tokens=2)
        plain = await api.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hello you"}], max_tokens=2
        )
        with_tool = await api.chat.completions.create(model="m", messages=parts, max_tokens=2, tools=[tool])
    assert joined.choices[0].message.content == plain.choices[0].message.content
    assert with_tool.usage.prompt_tokens > joined.usage.prompt_tokens


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format: an emulated runtime has no model"),
    ({"logprobs": True}, "logprobs: an emulated runtime has no model"),
    ({"n": 2}, "n above 1"),
    ({"tool_choice": "required"}, "tool_choice=required: an emulated runtime has no model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type image_url: an emulated"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "3004 tokens"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_answered_is_one_clear_400(
    quick: Emulated, change: dict[str, Any], message: str, stream: bool
) -> None:
    reply = await quick.post("/v1/chat/completions", **{"messages": QUESTION, "stream": stream} | change)
    assert reply.status == 400
    assert set(reply.json) == {"object", "message", "type", "param", "code"}
    assert (reply.json["object"], reply.json["code"]) == ("error", 400)
    assert message in reply.json["message"]


async def test_openais_client_shows_the_refusal(quick: Emulated) -> None:
    async with client(quick) as api:
        with pytest.raises(openai.BadRequestError, match="has no model"):
            await api.chat.completions.create(model="m", messages=QUESTION, logprobs=True)


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> ModelCodec:
    return ModelCodec(tiny_model)


async def test_with_a_model_its_tokenizer_and_template_count(tiny_model: Path, codec: ModelCodec) -> None:
    async with running(config(model_path=str(tiny_model))) as emulated, client(emulated) as api:
        answer = await api.chat.completions.create(model="m", messages=QUESTION, max_tokens=8)
        raw = await emulated.generate(1, 2, 3, max_new_tokens=8)
        too_big = await emulated.generate(5000)
    prompt = codec.encode(codec.render(QUESTION, []), is_chat=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert list(codec.encode(raw["text"], is_chat=True)) == raw["output_ids"]
    assert too_big["error"]["message"] == "input_ids: there are only token ids from 0 to 4095"
