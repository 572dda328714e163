"""Requests as bodies, and events as chunks, without a server."""

from dataclasses import replace
from typing import Any

import orjson

from preble_sgl.core import TokenLogprob
from preble_sgl.runtime_ext.wire import Answer, generate_body
from tests.runtime_ext.requests import request

META = {"prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 2}


def test_images_are_sent_with_the_text_that_they_stand_in() -> None:
    asked = replace(request([1 << 30, 5]), images=("cat.png",), text="<image> What is it?")
    body = orjson.loads(generate_body(asked, with_priority=False))
    assert "input_ids" not in body
    assert (body["text"], body["image_data"]) == ("<image> What is it?", ["cat.png"])


def test_logprobs_are_asked_of_generated_tokens_only() -> None:
    body = orjson.loads(generate_body(replace(request([5, 6]), num_top_logprobs=2), with_priority=False))
    assert (body["return_logprob"], body["top_logprobs_num"]) == (True, 2)
    assert "logprob_start_len" not in body


def test_logprobs_are_the_same_whether_a_server_repeats_them_or_not() -> None:
    one: dict[str, list[Any]] = {
        "output_token_logprobs": [[-0.5, 7, None]],
        "output_top_logprobs": [[[-0.5, 7, None]]],
    }
    two: dict[str, list[Any]] = {
        "output_token_logprobs": [[-1.0, 8, None]],
        "output_top_logprobs": [[[-1.0, 8, None]]],
    }
    both = {name: one[name] + two[name] for name in one}
    expected = (TokenLogprob(7, -0.5, ((7, -0.5),)), TokenLogprob(8, -1.0, ((8, -1.0),)))
    for incremental, second in ((True, two), (False, both)):
        answer = Answer(replace(request([5, 6]), num_top_logprobs=1), incremental=incremental)
        ids = ([7], [8]) if incremental else ([7], [7, 8])
        answer.chunk({"output_ids": ids[0], "text": "a", "meta_info": META | one | {"finish_reason": None}})
        end = {"finish_reason": {"type": "stop"}}
        last = answer.chunk({"output_ids": ids[1], "text": "ab", "meta_info": META | second | end})
        assert last.output_logprobs == expected
