"""Token ids of a growing conversation."""

from pathlib import Path

import orjson
import pytest

from preble_sgl.core import token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.conversation import Conversation
from preble_sgl.dsl.ops import Prompt, assistant, system, user
from preble_sgl.errors import InputError


def conversation(chat: ChatFormat) -> Conversation:
    return Conversation(chat, chat.encode)


def with_template(tiny_model: Path, tmp_path: Path, template: str | None) -> Path:
    """A copy of the tiny model's tokenizer with another chat template."""
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    config = orjson.loads((tiny_model / "tokenizer_config.json").read_bytes())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return tmp_path


def test_messages_added_one_by_one_give_the_ids_of_the_whole_rendered_chat(chat: ChatFormat) -> None:
    talk = conversation(chat)
    talk.add(system("Be brief.") + user("What is 2 + 2?"), "f:1")
    talk.add(assistant("4"), "f:2")
    talk.add(user("And 3 + 3?"), "f:3")
    assert talk.ids == chat.encode(chat.render(talk.messages))


def test_a_generation_is_appended_as_generated_and_never_retokenised(chat: ChatFormat) -> None:
    talk = conversation(chat)
    talk.add(user("Say x."), "f:1")
    with talk.answering("f:2"):
        pass
    before = talk.ids[:]
    odd = token_ids([300, 301, 302])  # not what the tokenizer would make of its text
    talk.close_answer(odd, chat.decode(odd), "f:2")
    talk.add(user("Again."), "f:3")
    assert talk.ids[: len(before) + 3] == before + odd
    assert talk.messages[1]["content"] == chat.decode(odd)


def test_the_end_of_turn_token_is_not_doubled_when_the_model_generated_it(chat: ChatFormat) -> None:
    end = chat.encode(chat.assistant_end)
    stopped, cut = conversation(chat), conversation(chat)
    for talk, output in ((stopped, token_ids([300, end[0]])), (cut, token_ids([300]))):
        talk.add(user("Say x."), "f:1")
        with talk.answering("f:2"):
            pass
        talk.close_answer(output, "x", "f:2")
    assert stopped.ids == cut.ids
    assert stopped.ids[-len(end) :] == end


def test_a_fork_continues_on_its_own(chat: ChatFormat) -> None:
    talk = conversation(chat)
    talk.add(user("Shared."), "f:1")
    shared = talk.ids[:]
    branch = talk.fork()
    branch.add(user("Only here."), "f:2")
    assert talk.ids == shared
    assert branch.ids[: len(shared)] == shared
    assert len(branch.messages) == 2


def test_segments_cover_the_prompt_in_order_and_name_their_line(chat: ChatFormat) -> None:
    talk = conversation(chat)
    talk.add(system("A.") + user("B."), "f:1")
    with talk.answering("f:2"):
        pass
    assert [segment.label for segment in talk.segments] == ["system f:1", "user f:1", "gen f:2"]
    assert talk.segments[-1].end == len(talk.ids)


def test_plain_text_and_messages_do_not_mix(chat: ChatFormat) -> None:
    talk = conversation(chat)
    talk.add(Prompt(()) + "Once upon a time", "f:1")
    with pytest.raises(InputError, match=r"f:2: a chat message after plain text"):
        talk.add(user("no"), "f:2")
    talk = conversation(chat)
    talk.add(user("yes"), "f:1")
    with pytest.raises(InputError, match=r"f:2: plain text after chat messages; wrap it in ps\.user"):
        talk.add(Prompt(()) + "no", "f:2")


def test_a_template_that_rewrites_what_came_before_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    last_only = "{% for m in messages %}{% if loop.last %}>{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="not prefix-stable"):
        ChatFormat.load(with_template(tiny_model, tmp_path, last_only))


def test_a_model_without_a_template_takes_plain_text_only(tiny_model: Path, tmp_path: Path) -> None:
    bare = ChatFormat.load(with_template(tiny_model, tmp_path, None))
    talk = conversation(bare)
    with pytest.raises(InputError, match="no chat template: write plain text"):
        talk.add(user("hello"), "f:1")
    talk = conversation(bare)
    talk.add(Prompt(()) + "hello", "f:1")
    assert bare.decode(talk.ids) == "hello"


def test_a_template_that_refuses_a_conversation_says_why(tiny_model: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    talk = conversation(ChatFormat.load(with_template(tiny_model, tmp_path, template)))
    with pytest.raises(InputError, match="no system role"):
        talk.add(system("x"), "f:1")


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        ChatFormat.load(tmp_path / "nowhere")
