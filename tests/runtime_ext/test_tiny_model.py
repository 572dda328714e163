"""The tiny model: always the same bytes, small, and fit for programs that talk in turns."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.tiny_model import CHAT_TEMPLATE, ensure_tiny_model, write_tiny_model


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_the_same_seed_gives_the_same_bytes_in_another_process(tiny_model: Path, tmp_path: Path) -> None:
    write = "import sys; from preble_sgl.runtime_ext.tiny_model import *; write_tiny_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "again")], check=True)
    assert digests(tmp_path / "again") == digests(tiny_model)
    assert set(digests(tiny_model)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_another_seed_changes_the_weights_and_not_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    first, other = digests(tiny_model), digests(write_tiny_model(tmp_path / "other", seed=1))
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"model.safetensors", "config.json"}


def test_text_survives_the_tokenizer_and_shrinks(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    for text in (Path(__file__).read_text(), "Summarise the document, please. Ça va? 你好 🙂\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    text = Path(__file__).read_text()
    assert len(tokenizer.encode(text).ids) < len(text) / 2


def test_the_chat_template_only_ever_appends() -> None:
    template = jinja2.Template(CHAT_TEMPLATE)
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    rendered = [
        template.render(messages=turns[: count + 1], add_generation_prompt=False) for count in range(4)
    ]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(rendered))
    asked = template.render(messages=turns[:2], add_generation_prompt=True)
    assert asked == rendered[1] + "<|im_start|>assistant\n"
    assert rendered[2].startswith(asked)


def test_an_earlier_model_is_replaced_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", seed=1)
    write_tiny_model(tmp_path / "model", seed=2)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and is not a tiny model"):
        write_tiny_model(tmp_path / "papers")
    with pytest.raises(InputError, match="exists and is not a tiny model"):
        write_tiny_model(tmp_path / "papers" / "thesis.tex")
    assert os.listdir(tmp_path / "papers") == ["thesis.tex"]


def test_the_cached_model_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ensure_tiny_model()
    written_at = (model / "config.json").stat().st_mtime_ns
    assert ensure_tiny_model() == model
    assert (model / "config.json").stat().st_mtime_ns == written_at
    assert list((tmp_path / "preble_sgl").iterdir()) == [model]


def test_two_processes_may_write_the_cached_model_at_once(tmp_path: Path) -> None:
    ensure = "from preble_sgl.runtime_ext.tiny_model import *; print(ensure_tiny_model())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", ensure], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = [process.communicate()[0].strip() for process in both]
    assert first == second
    assert [str(path) for path in (tmp_path / "preble_sgl").iterdir()] == [first]
