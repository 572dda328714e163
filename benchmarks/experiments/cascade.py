"""FlashInfer's decode kernel against our two passes over a shared prefix, without SGLang, on one GPU.

    python -m benchmarks.experiments.cascade [--repeats 50] [--out FILE]

Heads of Llama 3 8B in bfloat16. A group of requests has one prefix and 64 tokens of its own each, in
scattered slots. Both are planned once, as for all layers of a step, then run in turn; given are medians of
the time of a layer, and how far each is from attention in float64. No GPU has run this yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import orjson
import torch
import typer
from rich.console import Console
from rich.table import Table

from preble_sgl.runtime_ext.plugin.shared_prefix.cascade import Cascade, Merge, Shape
from preble_sgl.runtime_ext.plugin.shared_prefix.groups import find_sharing

RESULT = Path("benchmarks/results/gpu/cascade.json")
GROUPS, PREFIXES, OWN = (1, 4, 16, 64), (512, 2048, 8192, 16384), 64
LLAMA_3_8B = Shape(32, 8, 128, torch.bfloat16, torch.bfloat16)
SCALE = 128**-0.5


@dataclass(frozen=True, slots=True)
class Kernels:
    """FlashInfer's, or what stands in for them. `decode` and `prefill` make a wrapper."""

    device: str
    decode: Callable[[], Any]
    prefill: Callable[[], Any]
    merge: Merge
    synchronize: Callable[[], None]


def flashinfer_kernels() -> Kernels:
    """Return the kernels of the installed FlashInfer, as SGLang's backend makes them."""
    import flashinfer

    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    return Kernels(
        "cuda",
        lambda: flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa2", use_tensor_cores=True
        ),
        lambda: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2"),
        flashinfer.merge_state,
        torch.cuda.synchronize,
    )


def measure(kernels: Kernels, shape: Shape, size: int, prefix_len: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one group."""
    length = prefix_len + OWN
    generator = torch.Generator().manual_seed(size * prefix_len)
    slots = torch.randperm(prefix_len + size * OWN, generator=generator).int()
    own = slots[prefix_len:].reshape(size, OWN)
    table = torch.cat([slots[:prefix_len].expand(size, -1), own], dim=1).contiguous()
    queries = torch.randn(size, shape.num_qo_heads, shape.head_dim, generator=generator)
    cache = [torch.randn(len(slots), shape.num_kv_heads, shape.head_dim, generator=generator) for _ in "kv"]
    queries, *cache = (one.to(kernels.device, shape.q_dtype) for one in (queries, *cache))
    on_device, rows = table.to(kernels.device), torch.arange(size, device=kernels.device)

    stock = kernels.decode()
    stock.begin_forward(
        torch.arange(0, (size + 1) * length, length, dtype=torch.int32),
        on_device.flatten(),
        torch.ones(size, dtype=torch.int32),
        *shape.planned,
        q_data_type=shape.q_dtype,
        data_type=shape.kv_dtype,
    )
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "stock": lambda: stock.forward(queries, tuple(cache), sm_scale=SCALE)
    }
    if size > 1:
        cascade = Cascade(kernels.decode(), kernels.prefill(), kernels.merge, shape)
        cascade.plan(find_sharing(table, [length - 1] * size, 1), on_device, rows, [length] * size)
        runs["cascade"] = lambda: cascade.forward(queries, tuple(cache), sm_scale=SCALE)
    wanted = attention(queries, [one[on_device.long()] for one in cache])
    times = {name: [timed(run, kernels) for _ in range(repeats)] for name, run in runs.items()}
    return {
        "group": size,
        "prefix": prefix_len,
        "layer_us": {name: 1e6 * median(values) for name, values in times.items()},
        "layer_us_extremes": {name: [1e6 * min(v), 1e6 * max(v)] for name, v in times.items()},
        "largest_error": {name: float((run() - wanted).abs().max()) for name, run in runs.items()},
        "kv_read_ratio": size * length / (prefix_len + size * OWN),
    }


def timed(run: Callable[[], torch.Tensor], kernels: Kernels) -> float:
    """Return the seconds of one run."""
    kernels.synchronize()
    began_at = perf_counter()
    run()
    kernels.synchronize()
    return perf_counter() - began_at


def attention(queries: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
    """Return attention in float64; `cache`: keys and values, (requests, positions, KV heads, dim)."""
    share = queries.shape[1] // cache[0].shape[2]
    keys, values = (one.double().repeat_interleave(share, 2) for one in cache)
    scores = torch.einsum("rhd,rphd->rhp", queries.double(), keys) * SCALE
    return torch.einsum("rhp,rphd->rhd", scores.softmax(-1), values)


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 50,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Measure, print and keep the figures."""
    kernels = flashinfer_kernels()
    rows = [measure(kernels, LLAMA_3_8B, size, length, repeats) for length in PREFIXES for size in GROUPS]
    shown = Table("prefix", "group", "stock, µs", "cascade, µs", "KV read ÷", title="one layer")
    for one in rows:
        times = (f"{one['layer_us'].get(name, float('nan')):.0f}" for name in ("stock", "cascade"))
        shown.add_row(str(one["prefix"]), str(one["group"]), *times, f"{one['kv_read_ratio']:.1f}")
    Console().print(shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "repeats": repeats}
    out.write_bytes(orjson.dumps({**about, "rows": rows}, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    typer.run(main)
