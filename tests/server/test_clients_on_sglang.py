"""Official and popular clients over two real runtimes: they work, and say what one runtime says by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
from anyio.from_thread import start_blocking_portal
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.fleet import Fleet
from preble_sgl.server.prompts import Prompts
from tests.server.serving import Served, served, serving

pytestmark = pytest.mark.sglang

QUESTION: list[Any] = [{"role": "user", "content": "Say something about the weather in Paris, please."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
        },
    },
}


class Verdict(BaseModel):
    is_good: bool


@pytest.fixture(scope="module")
def base_url(runtime_urls: tuple[str, str], tiny_model: Path) -> Iterator[str]:
    """A server in a thread of its own, as some clients block."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(served(runtime_urls, tiny_model)) as server,
    ):
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(runtime_urls: tuple[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{runtime_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (model,) = [model.id for model in client.models.list()]
    return model


def ask(client: openai.OpenAI, model: str, messages: list[Any] = QUESTION, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, **({"max_tokens": 12} | more)
    )


def test_answers_equal_those_of_a_runtime_asked_directly(
    client: openai.OpenAI, direct: openai.OpenAI, model: str
) -> None:
    for number in range(6):
        messages = [{"role": "user", "content": f"Tell me about number {number}."}]
        ours, theirs = (ask(one, model, messages).choices[0] for one in (client, direct))
        assert ours.message.content == theirs.message.content
        assert ours.finish_reason == theirs.finish_reason


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model).choices[0].message.content
    chunks = list(ask(client, model, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    *_, last = ask(client, model, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens_details.cached_tokens > 0


async def test_the_async_client(base_url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=model, messages=QUESTION, max_tokens=4)
        assert answer.usage
        assert answer.usage.completion_tokens == 4
        stream = await client.completions.create(model=model, prompt="Once", max_tokens=4, stream=True)
        assert [chunk async for chunk in stream]


def test_several_answers_and_log_probabilities(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, n=2, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert all(len(choice.logprobs.content) == 12 for choice in answer.choices)
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_structured_output(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=Verdict, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_tools_are_the_same_as_of_a_runtime_asked_directly(
    client: openai.OpenAI, direct: openai.OpenAI, model: str
) -> None:
    more: Any = {"tools": [WEATHER], "max_tokens": 40}
    ours, theirs = (ask(one, model, **more).choices[0] for one in (client, direct))
    assert ours.message.content == theirs.message.content
    assert ours.message.tool_calls == theirs.message.tool_calls


def test_a_refusal_reaches_the_client_as_its_own_error(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, model, messages=[])
    with pytest.raises(openai.BadRequestError):
        ask(client, model, max_tokens=10**6)


async def test_langchain(base_url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=6)  # type: ignore[arg-type,call-arg]
    whole = await chat.ainvoke("Hello")
    streamed = [str(chunk.content) async for chunk in chat.astream("Hello")]
    assert "".join(streamed) == whole.content


async def test_pydantic_ai(base_url: str, model: str) -> None:
    provider = OpenAIProvider(base_url=base_url, api_key="none")
    agent = Agent(OpenAIChatModel(model, provider=provider), model_settings={"max_tokens": 6})
    assert isinstance((await agent.run("Hello")).output, str)


def test_litellm(base_url: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network when imported
    import litellm

    answer: Any = litellm.completion(
        model=f"openai/{model}", messages=QUESTION, api_base=base_url, api_key="none", max_tokens=6
    )
    assert answer.usage.completion_tokens == 6


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": QUESTION},
    {"messages": [{"role": "system", "content": "Be kind."}, *QUESTION]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("one", "two")]}]},
    {"messages": QUESTION, "tools": [WEATHER]},
    {"messages": [*QUESTION, {"role": "assistant", "content": None}, *QUESTION]},
    {"messages": [*QUESTION, {"role": "assistant", "content": "Sunny"}, {"role": "user", "content": "no"}]},
]


@pytest.mark.parametrize("body", CONVERSATIONS)
async def test_our_tokens_of_a_chat_are_the_runtime_s(
    real: Served, tiny_model: Path, body: dict[str, Any]
) -> None:
    ours = await Prompts(ChatFormat.load(tiny_model)).chat(body)
    told = await real.post("/v1/tokenize", body)
    assert told.json["tokens"] == ours.tolist()


async def test_a_conversation_stays_where_its_beginning_is_cached(real: Served) -> None:
    messages = [{"role": "user", "content": "A story with a beginning. " * 10}]
    workers, cached = set(), []
    for _ in range(4):
        reply = await real.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4})
        answer: Any = reply.json
        workers.add(reply.headers["x-preble-worker"])
        cached.append(int(reply.headers["x-preble-cached-tokens"]))
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    assert len(workers) == 1
    assert cached[0] == 0
    assert cached[1] < cached[2] < cached[3]


async def test_a_client_that_leaves_ends_its_request_on_the_runtime(real: Served) -> None:
    body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
    async with real.session.post(f"{real.url}/generate", json=body) as response:
        worker = response.headers["x-preble-worker"]
        assert await response.content.readany()
    await real.wait_idle()
    (runtime,) = [one["url"] for one in real.fleet.describe_workers() if one["worker_id"] == worker]
    with anyio.fail_after(20):
        while await num_running(real, runtime):
            await anyio.sleep(0.1)


async def num_running(server: Served, url: str) -> int:
    async with server.session.get(f"{url}/v1/loads") as response:
        (load,) = (await response.json())["loads"]
        return int(load["num_running_reqs"])


async def test_embeddings_are_those_of_a_runtime_asked_directly(tiny_model: Path) -> None:
    async with (
        Fleet.launch(tiny_model, runtimes=1, extra_args=["--is-embedding"]) as fleet,
        serving(fleet) as server,
    ):
        (worker,) = fleet.describe_workers()
        texts = ["hello there", "hello you"]
        found = []
        for url in (server.url, worker["url"]):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                answer = await client.embeddings.create(model="m", input=texts, encoding_format="float")
            found.append([one.embedding for one in answer.data])
        for ours, direct in zip(*found, strict=True):
            assert ours == pytest.approx(direct, abs=1e-5)
