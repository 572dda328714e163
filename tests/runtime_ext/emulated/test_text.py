"""Made-up tokens and made-up answers."""

import random
from pathlib import Path

import pytest

from preble_sgl.core import token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated.text import ModelCodec, PseudoCodec, load_codec, script_for

PROSE = "The quick brown fox jumps over the lazy dog, which was asleep. Nobody had expected this to happen. "


def test_the_ids_of_a_text_begin_the_ids_of_a_longer_one() -> None:
    codec = PseudoCodec()
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choices("ab \n\té😀", k=rng.randrange(40)))
        more = "".join(rng.choices("ab \n\té😀", k=rng.randrange(40)))
        ids, longer = codec.encode(text, is_chat=False), codec.encode(text + more, is_chat=False)
        assert longer[: max(0, len(ids) - 1)] == ids[:-1]  # the last piece may go on


def test_a_token_has_about_four_characters() -> None:
    assert 4 < len(PROSE) / len(PseudoCodec().encode(PROSE, is_chat=False)) < 5


def test_an_answer_read_again_after_its_prompt_is_the_ids_that_were_generated() -> None:
    codec = PseudoCodec()
    text = codec.render([{"role": "user", "content": "Tell me."}], [])
    prompt = codec.encode(text, is_chat=True)
    script = script_for(prompt, 50, codec.words)
    assert codec.encode(text + script.text, is_chat=True) == prompt + script.ids


def test_every_beginning_of_an_answer_has_its_text() -> None:
    script = script_for(token_ids([1, 2]), 6, PseudoCodec().words)
    words = script.text.split()
    assert [script.text[:end].split() for end in script.ends] == [words[:count] for count in range(7)]
    assert script_for(token_ids([1, 2]), 3, PseudoCodec().words).ids == script.ids[:3]


def test_a_models_answer_reads_as_its_tokenizer_has_it(tiny_model: Path) -> None:
    codec = ModelCodec(tiny_model)
    script = script_for(token_ids([1, 2]), 30, codec.words)
    assert codec.encode(script.text, is_chat=True) == script.ids


def test_a_model_without_template_takes_no_chat(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        load_codec(str(tmp_path)).render([], [])


def test_a_template_that_fails_is_the_messages_fault(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="cannot render these messages"):
        ModelCodec(tiny_model).render([{"role": "user"}, {}], [])


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model directory"):
        load_codec(str(tmp_path))
