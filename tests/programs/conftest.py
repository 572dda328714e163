"""The tiny model's tokenizer."""

from pathlib import Path

import pytest

from preble_sgl.dsl.chat import ChatFormat


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> ChatFormat:
    """Tokenizer and chat template of the tiny model."""
    return ChatFormat.load(tiny_model)
