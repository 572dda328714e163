"""Tokenising in parts equals tokenising as a whole."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit

from preble_sgl.core import token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.segments import SegmentEncoder


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def specials(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_make_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    pieces = st.text(max_size=12) | st.sampled_from([*specials(tokenizer), "<", "|", " ", "\n", "<|", ">"])
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    encoder = SegmentEncoder(tokenizer, most_chars=100)
    whole = token_ids(tokenizer.encode(text, add_special_tokens=False).ids)
    assert encoder.cuts
    assert encoder.encode(text) == whole
    assert encoder.encode(text) == whole


def test_a_conversation_that_grew_is_tokenised_from_where_it_grew(tiny_model: Path) -> None:
    chat = ChatFormat.load(tiny_model)
    messages = [{"role": "user", "content": "word " * 500}]
    chat.encode_in_parts(chat.render(messages, open_answer=True))
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and now"}]
    grown = chat.render(messages, open_answer=True)
    assert chat.segments.unknown_len(grown) < 100
    assert chat.encode_in_parts(grown) == chat.encode(grown)
    assert chat.segments.unknown_len(grown) == 0


def test_a_tokenizer_that_looks_beyond_its_special_tokens_is_given_the_whole() -> None:
    tokenizer = Tokenizer(WordLevel({"▁a": 0, "a": 1, "?": 2, "<s>": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    encoder = SegmentEncoder(tokenizer)
    assert encoder.encode("<s>a").tolist() == tokenizer.encode("<s>a").ids


def test_without_special_tokens_there_is_one_part() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    encoder = SegmentEncoder(tokenizer)
    assert not encoder.cuts
    assert encoder.encode("a b").tolist() == [0, 1]
    assert encoder.encode("").tolist() == []
