"""The little that we read of a model's directory ourselves."""

import json
from pathlib import Path

from preble_sgl.errors import InputError

NEEDED = ("config.json", "tokenizer.json")


def require_model(model_path: Path) -> None:
    """Raise `InputError` unless the directory looks like a Hugging Face model with a fast tokenizer."""
    if not model_path.is_dir():
        raise InputError(
            f"no model at {model_path}: give a directory, or make one with `preble-sgl make-model`"
        )
    for name in NEEDED:
        if not (model_path / name).is_file():
            raise InputError(f"{model_path} is not a model directory: it has no {name}")


def vocab_size(model_path: str) -> int | None:
    """Return how many token ids the model knows, or `None` if its files are not on this machine."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = config.get("text_config", config).get("vocab_size")
    return size if isinstance(size, int) else None
