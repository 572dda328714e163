"""Attention in parts is attention: against a reference in float64, over random trees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import find_sharing
from preble_sgl.runtime_ext.plugin.shared_prefix.steps import Decode, Extend
from tests.runtime_ext.plugin.shared_prefix.trees import Batch, random_batch

HEADS = st.sampled_from([(4, 4), (4, 2), (8, 1)])
DIM, SCALE = 16, 0.3


def tensors(batch: Batch, num_queries: int, heads: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """Return queries, keys and values with large and small scores."""
    generator = torch.Generator().manual_seed(seed)
    queries = 4 * torch.randn(num_queries, heads[0], DIM, generator=generator)
    cache = [torch.randn(batch.num_slots, heads[1], DIM, generator=generator) for _ in range(2)]
    return [queries, *cache]


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one token, (heads, dim), to all of some KV."""
    share = query.shape[0] // keys.shape[1]
    keys, values = (one.double().repeat_interleave(share, 1) for one in (keys, values))
    scores = torch.einsum("hd,khd->hk", query.double(), keys) * SCALE
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), heads=HEADS, min_saved=st.sampled_from([1, 20]))
def test_decode(seed: int, heads: tuple[int, int], min_saved: int) -> None:
    batch = random_batch(seed)
    queries, keys, values = tensors(batch, len(batch.lens), heads, seed)
    first = [max(1, one - 1) for one in batch.lens]
    decode = Decode(find_sharing(batch.rows, [one - 1 for one in first], min_saved), first)
    for lens in (first, batch.lens):  # the next step has one more token each
        decode.step(batch.rows, torch.arange(len(lens)), torch.tensor(lens))
        got = decode.attend(queries, keys, values, SCALE)
        for number, end in enumerate(lens):
            slots = batch.rows[number, :end].long()
            wanted = reference(queries[number], keys[slots], values[slots])
            assert torch.allclose(got[number].double(), wanted, atol=2e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), heads=HEADS, min_saved=st.sampled_from([1, 20]), cached=st.booleans())
def test_extend(seed: int, heads: tuple[int, int], min_saved: int, cached: bool) -> None:
    batch = random_batch(seed, most_requests=6)
    before = batch.shared if cached else [0] * len(batch.lens)
    new = [end - start for start, end in zip(before, batch.lens, strict=True)]
    queries, keys, values = tensors(batch, sum(new), heads, seed)
    sharing = find_sharing(batch.rows, before, min_saved)
    got = Extend(sharing, batch.rows, before, batch.lens).attend(queries, keys, values, SCALE)
    token = 0
    for number, (start, end) in enumerate(zip(before, batch.lens, strict=True)):
        for at in range(start, end):
            slots = batch.rows[number, : at + 1].long()
            wanted = reference(queries[token], keys[slots], values[slots])
            assert torch.allclose(got[token].double(), wanted, atol=2e-5)
            token += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_inputs(dtype: torch.dtype) -> None:
    batch = random_batch(7)
    queries, keys, values = (one.to(dtype) for one in tensors(batch, len(batch.lens), (4, 2), 7))
    got, whole = (attended(batch, min_saved).attend(queries, keys, values, SCALE) for min_saved in (1, 10**9))
    assert torch.allclose(got, whole, atol=3e-2)


def attended(batch: Batch, min_saved: int) -> Decode:
    decode = Decode(find_sharing(batch.rows, [one - 1 for one in batch.lens], min_saved), batch.lens)
    decode.step(batch.rows, torch.arange(len(batch.lens)), torch.tensor(batch.lens))
    return decode
