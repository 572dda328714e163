"""Write a small Llama with random weights, so that real SGLang can run where no model and no GPU is.

The tokenizer is a byte-level BPE learnt from the running Python's own standard library, so that English
and Python text both take less than half as many tokens as bytes. Same seed, same Python, same bytes.
"""

import hashlib
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from safetensors.numpy import save_file

from preble_sgl.errors import InputError

Weights = dict[str, npt.NDArray[np.float32]]

CONTEXT_LEN = 32768
VOCAB_SIZE = 4096
HIDDEN = 128
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN // NUM_HEADS
MLP_WIDTH = 3 * HIDDEN

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "pydoc_data/topics.py",
    "argparse.py",
    "ast.py",
    "asyncio/base_events.py",
    "collections/__init__.py",
    "concurrent/futures/_base.py",
    "datetime.py",
    "difflib.py",
    "functools.py",
    "http/client.py",
    "inspect.py",
    "json/encoder.py",
    "logging/__init__.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "subprocess.py",
    "textwrap.py",
    "typing.py",
    "unittest/mock.py",
)

AUTHOR = "preble_sgl.runtime_ext.tiny_model"
ENDS = {"bos_token_id": 0, "eos_token_id": SPECIAL_TOKENS.index(TURN_END), "pad_token_id": 0}
CONFIG = ENDS | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "author": AUTHOR,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT_LEN,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": TURN_END,
    "pad_token": END_OF_TEXT,
    "model_max_length": CONTEXT_LEN,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
LAYER_SHAPES = {
    "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "mlp.gate_proj": (MLP_WIDTH, HIDDEN),
    "mlp.up_proj": (MLP_WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP_WIDTH),
}


def write_tiny_model(directory: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write config, weights, tokenizer and chat template in Hugging Face format; return the directory.

    About 1.8 million parameters, 7 MB, a few seconds. Greedy output is varied printable text that never
    ends by itself: ask for `max_new_tokens`, or for a grammar. Overwrites an earlier model of ours.

    Raises `InputError` if the directory holds anything else.
    """
    target = Path(directory)
    _require_ours(target)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    tokenizer.save(str(target / "tokenizer.json"))
    save_file(_weights(seed, tokenizer), target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "generation_config.json", ENDS)
    _write_json(target / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(target / "config.json", CONFIG | {"seed": seed})
    return target


def default_model_dir() -> Path:
    """Return where `ensure_tiny_model` keeps its model. All that determines its bytes is in the name."""
    determines = hashlib.sha256(Path(__file__).read_bytes())
    determines.update(f"{platform.python_version()} {np.__version__} {tokenizers.__version__}".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "preble_sgl" / f"tiny-llama-{determines.hexdigest()[:8]}"


def ensure_tiny_model() -> Path:
    """Return the cached tiny model, writing it first if needed. Two processes may do so at once."""
    target = default_model_dir()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _publish(write_tiny_model(Path(scratch) / "model"), target)
    return target


def _publish(written: Path, target: Path) -> None:
    """Move the finished model into place, unless another process was faster."""
    try:
        written.rename(target)
    except OSError:
        if not _is_ours(target):
            raise


def _require_ours(target: Path) -> None:
    if target.exists() and not (target.is_dir() and (_is_ours(target) or not any(target.iterdir()))):
        raise InputError(f"{target} exists and is not a tiny model: choose a new or empty directory")


def _is_ours(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("author") == AUTHOR


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_path("stdlib"))
    texts = ((library / name).read_text(encoding="utf-8") for name in CORPUS)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _weights(seed: int, tokenizer: tokenizers.Tokenizer) -> Weights:
    """Draw the weights, in a fixed order so that they depend on the seed alone."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)

    weights = {"model.embed_tokens.weight": normal(VOCAB_SIZE, HIDDEN)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in LAYER_SHAPES.items():
            weights[f"{prefix}{name}.weight"] = normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = np.ones(HIDDEN, dtype=np.float32)
    weights["model.norm.weight"] = np.ones(HIDDEN, dtype=np.float32)
    weights["lm_head.weight"] = normal(VOCAB_SIZE, HIDDEN) * _printable(tokenizer)
    return weights


def _printable(tokenizer: tokenizers.Tokenizer) -> npt.NDArray[np.float32]:
    """Return a column of 1 for every token that is printable text by itself, 0 for the others.

    A logit of zero is never the largest of four thousand, so greedy output holds neither special tokens
    nor control characters nor halves of characters; a grammar can still force them.
    """
    return np.array(
        [[_is_printable(tokenizer.decode([token]))] for token in range(VOCAB_SIZE)], dtype=np.float32
    )


def _is_printable(text: str) -> bool:
    return text != "" and text.isascii() and text.strip("\n ").isprintable()
