"""Stand-in for the compiled sgl_kernel, for a CPU without AMX.

With SGLANG_USE_CPU_ENGINE=1 SGLang imports some names from sgl_kernel before it knows whether it will
need them; with `--attention-backend torch_native` the ordinary path reaches none of them. They serve
speculative decoding and seeded sampling. What is cheap to do in torch is done, the rest refuses.

It must not define torch.ops.sgl_kernel.convert_weight_packed: that name is how SGLang detects AMX.
"""

import torch

__version__ = "0.0.0+stub"

MASK_32 = 0xFFFFFFFF
_library = torch.library.Library("sgl_kernel", "FRAGMENT")


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write each request's new cache slots into its row of the request-to-token table."""
    done = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        slots = out_cache_loc[done : done + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        done += end - start


def _multiply_32(a, constant):
    """Return a * constant modulo 2**32 in halves, because the whole product overflows int64."""
    low, high = a & 0xFFFF, a >> 16
    return (low * constant + (((high * constant) & 0xFFFF) << 16)) & MASK_32


def _rotate_left(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & MASK_32


def _mix(digest, word):
    word = _multiply_32(_rotate_left(_multiply_32(word, 0xCC9E2D51), 15), 0x1B873593)
    digest = _rotate_left(digest ^ word, 13)
    return (_multiply_32(digest, 5) + 0xE6546B64) & MASK_32


def _murmur_hash32(seed, positions, columns):
    """MurmurHash3 of (seed, position, column), one row per seed and one column per column."""
    seed = seed.to(torch.int64)
    digest = _mix(torch.zeros_like(seed), seed & MASK_32)
    digest = _mix(digest, (seed >> 32) & MASK_32)
    digest = _mix(digest, positions.to(torch.int64) & MASK_32)
    digest = _mix(digest[:, None], (columns.to(torch.int64) & MASK_32)[None, :])
    digest = digest ^ 16
    digest = _multiply_32(digest ^ (digest >> 16), 0x85EBCA6B)
    digest = _multiply_32(digest ^ (digest >> 13), 0xC2B2AE35)
    return (digest ^ (digest >> 16)).to(torch.uint32)


_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def __getattr__(name):
    """Let any other kernel be imported, and refuse when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on this CPU")

    return missing
