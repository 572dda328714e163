"""The tiny model's tokenizer, and a backend that answers at once."""

from pathlib import Path

import pytest

from preble_sgl.dsl.chat import ChatFormat
from tests.fakes import FakeBackend


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> ChatFormat:
    """Tokenizer and chat template of the tiny model."""
    return ChatFormat.load(tiny_model)


@pytest.fixture
def backend(chat: ChatFormat) -> FakeBackend:
    """A backend that says "fine" to everything."""
    return FakeBackend(chat)
