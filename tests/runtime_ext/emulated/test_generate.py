"""`/generate`: shapes and counts as SGLang's, answers that depend on the prompt alone, one clear refusal."""

from typing import Any

import pytest

from preble_sgl.runtime_ext.wire import refusal
from tests.runtime_ext.emulated.runtimes import Emulated, config, running

META = {
    *("id", "finish_reason", "prompt_tokens", "weight_version", "num_retractions", "reasoning_tokens"),
    *("completion_tokens", "cached_tokens", "cached_tokens_details", "dp_rank"),
}


async def test_an_answer_has_the_length_asked_for_and_says_what_was_cached(quick: Emulated) -> None:
    first = await quick.generate(*range(100), max_new_tokens=7, rid="mine")
    assert set(first) == {"text", "output_ids", "meta_info"}
    meta = first["meta_info"]
    assert set(meta) == META | {"e2e_latency"}
    assert (meta["id"], meta["finish_reason"]) == ("mine", {"type": "length", "length": 7})
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (100, 7, 0)
    assert (len(first["output_ids"]), len(first["text"].split())) == (7, 7)
    again = await quick.generate(*range(100), max_new_tokens=7)
    assert again["meta_info"]["cached_tokens"] == 99
    assert (again["text"], again["output_ids"]) == (first["text"], first["output_ids"])


async def test_generated_tokens_are_cached_except_the_last(quick: Emulated) -> None:
    first = await quick.generate(*range(50), max_new_tokens=10)
    longer = await quick.generate(*range(50), *first["output_ids"], 7)
    assert longer["meta_info"]["cached_tokens"] == 59


async def test_a_shorter_answer_is_the_beginning_of_a_longer_one(quick: Emulated) -> None:
    short = await quick.generate(1, 2, 3, max_new_tokens=2)
    long = await quick.generate(1, 2, 3, max_new_tokens=9)
    other = await quick.generate(1, 2, 4, max_new_tokens=9)
    assert long["output_ids"][:2] == short["output_ids"]
    assert long["text"].startswith(short["text"])
    assert other["output_ids"] != long["output_ids"]


async def test_zero_new_tokens_fill_the_cache_and_answer_nothing(quick: Emulated) -> None:
    warm = await quick.generate(*range(30), max_new_tokens=0)
    assert (warm["text"], warm["output_ids"], warm["meta_info"]["completion_tokens"]) == ("", [], 0)
    assert (await quick.generate(*range(30)))["meta_info"]["cached_tokens"] == 29


async def test_without_a_length_an_answer_has_128_tokens_and_stops_at_what_fits(quick: Emulated) -> None:
    usual = (await quick.post("/generate", text="hello")).json
    most = await quick.generate(*range(1990), max_new_tokens=1000)
    assert usual["meta_info"]["completion_tokens"] == 128
    assert most["meta_info"]["completion_tokens"] == len(most["output_ids"]) <= 10


async def test_a_stream_repeats_everything_by_default(quick: Emulated) -> None:
    whole = await quick.generate(1, 2, 3)
    reply = await quick.post(
        "/generate", input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4}, stream=True
    )
    *events, done = reply.events
    assert done == "[DONE]"
    for event in events:
        assert event["output_ids"] == whole["output_ids"][: event["meta_info"]["completion_tokens"]]
        assert whole["text"].startswith(event["text"])
        assert event["meta_info"]["cached_tokens"] == 2
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert set(events[0]["meta_info"]) == META
    assert (events[-1]["text"], events[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 4}


async def test_an_incremental_stream_carries_only_what_is_new() -> None:
    async with running(config(incremental=True)) as emulated:
        whole = await emulated.generate(1, 2, 3, max_new_tokens=20)
        params = {"max_new_tokens": 20}
        reply = await emulated.post("/generate", input_ids=[1, 2, 3], sampling_params=params, stream=True)
        assert (await emulated.get("/server_info")).json["incremental_streaming_output"] is True
    *events, _ = reply.events
    assert [token for event in events for token in event["output_ids"]] == whole["output_ids"]
    assert "".join(event["text"] for event in events) == whole["text"]
    assert events[-1]["meta_info"]["completion_tokens"] == 20


async def test_a_batch_is_answered_in_order_with_its_own_parameters(quick: Emulated) -> None:
    params = [{"max_new_tokens": 3}, {"max_new_tokens": 1}]
    reply = await quick.post("/generate", text=["one two", "three"], sampling_params=params, rid="b")
    first, second = reply.json
    assert [one["meta_info"]["id"] for one in (first, second)] == ["b_0", "b_1"]
    assert [one["meta_info"]["completion_tokens"] for one in (first, second)] == [3, 1]
    alone = (await quick.post("/generate", text="one two", sampling_params=params[0])).json
    assert alone["text"] == first["text"]


async def test_a_stream_of_a_batch_says_whose_each_event_is(quick: Emulated) -> None:
    params = {"max_new_tokens": 3}
    reply = await quick.post(
        "/generate", input_ids=[[1, 2], [1, 3]], sampling_params=params, rid=["x", "y"], stream=True
    )
    *events, _ = reply.events
    last = {event["index"]: event for event in events}
    assert [last[index]["meta_info"]["id"] for index in (0, 1)] == ["x", "y"]
    assert [len(last[index]["output_ids"]) for index in (0, 1)] == [3, 3]


async def test_a_list_of_one_prompt_is_answered_by_a_list(quick: Emulated) -> None:
    reply = await quick.post("/generate", input_ids=[[1, 2]], return_prompt_token_ids=True)
    assert [one["prompt_token_ids"] for one in reply.json] == [[1, 2]]


async def test_a_salt_keeps_caches_apart(quick: Emulated) -> None:
    await quick.generate(*range(40), cache_salt="a")
    other = await quick.generate(*range(40), cache_salt="b")
    same = await quick.generate(*range(40), cache_salt="a")
    assert [one["meta_info"]["cached_tokens"] for one in (other, same)] == [0, 39]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "give either text or input_ids"),
        ({"text": ""}, "the prompt is empty"),
        ({"text": []}, "the prompt is empty"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [[1], []]}, "the prompt is empty"),
        ({"text": 5}, "text"),
        ({"input_ids": ["1"]}, "input_ids"),
        ({"input_ids": [1.0]}, "input_ids"),
        ({"input_ids": [-1]}, "only token ids from 0 to"),
        ({"input_ids": [2**40]}, "beyond 32 bits"),
        ({"input_ids": list(range(2001))}, "2001 tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": "5"}}, "max_new_tokens"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
        ({"text": "a", "sampling_params": {"n": 2}}, "n above 1"),
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "regex: an emulated runtime has no model"),
        ({"text": "a", "sampling_params": {"json_schema": "{}"}}, "json_schema: an emulated runtime has no"),
        ({"text": "a", "return_logprob": True}, "return_logprob: an emulated runtime has no model"),
        ({"text": "a", "image_data": "x.png"}, "image_data: an emulated runtime has no model"),
        ({"text": "a", "extra_key": "x"}, "cache_salt"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid: 1 given for 2 prompts"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request ID detected: x"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params: 1 given for 2 prompts"),
    ],
)
async def test_what_cannot_be_answered_is_one_clear_400(
    quick: Emulated, body: dict[str, Any], message: str
) -> None:
    reply = await quick.post("/generate", **body)
    assert reply.status == 400
    assert message in refusal(reply.body)
    assert "\n" not in refusal(reply.body)
    assert (await quick.load())["num_running_reqs"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
async def test_what_is_no_json_object_is_one_clear_400(quick: Emulated, body: bytes) -> None:
    reply = await quick.post_bytes("/generate", body)
    assert (reply.status, reply.json["object"]) == (400, "error")
    assert refusal(reply.body).startswith("the body ")


async def test_parameters_that_change_nothing_are_accepted(quick: Emulated) -> None:
    params = {"max_new_tokens": 2, "temperature": 0.7, "stop": ["x"], "ignore_eos": True, "regex": None}
    reply = await quick.post("/generate", text="a", sampling_params=params, return_logprob=False)
    assert reply.status == 200


async def test_a_prompt_refused_by_the_engine_is_an_event_of_a_stream(quick: Emulated) -> None:
    reply = await quick.post("/generate", input_ids=list(range(2001)), stream=True)
    event, done = reply.events
    assert (reply.status, done, event["error"]["code"]) == (200, "[DONE]", 400)
    assert "2001 tokens" in event["error"]["message"]


async def test_a_request_id_in_use_is_refused() -> None:
    async with running(config(step_s=1e6)) as emulated:
        stream = {"input_ids": [1], "rid": "same", "stream": True}
        async with emulated.session.post(f"{emulated.url}/generate", json=stream):
            reply = await emulated.post("/generate", input_ids=[1], rid="same")
        assert reply.status == 400
        assert "Duplicate request ID" in reply.json["error"]["message"]
