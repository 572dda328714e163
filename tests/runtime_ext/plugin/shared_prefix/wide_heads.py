"""The tiny model with as much KV per token as a larger one has, so that short prefixes are worth sharing."""

import shutil
from pathlib import Path

import numpy as np
import orjson
from safetensors.numpy import load_file, save_file

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}


def with_wide_heads(model: Path, directory: Path) -> Path:
    """Write the model to a directory with random attention weights of other shapes."""
    for file in model.iterdir():
        shutil.copy(file, directory)
    config = orjson.loads((model / "config.json").read_bytes()) | WIDE
    (directory / "config.json").write_bytes(orjson.dumps(config))
    queries, keys = (
        config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    shapes = {"q_proj": (queries, -1), "k_proj": (keys, -1), "v_proj": (keys, -1), "o_proj": (-1, queries)}
    rng = np.random.default_rng(0)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        shape = shapes.get(name.split(".")[-2])
        if shape is not None:
            rows, columns = (config["hidden_size"] if size == -1 else size for size in shape)
            weights[name] = rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
