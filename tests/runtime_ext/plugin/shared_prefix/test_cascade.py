"""FlashInfer's kernels in two passes: the plans, with kernels in torch, against a reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.experiments.cascade import Kernels, measure
from preble_sgl.runtime_ext.plugin.shared_prefix.cascade import Cascade, Shape, levels_of
from preble_sgl.runtime_ext.plugin.shared_prefix.groups import find_sharing
from tests.runtime_ext.plugin.shared_prefix.test_steps import DIM, HEADS, SCALE, reference, tensors
from tests.runtime_ext.plugin.shared_prefix.torch_kernels import PagedKernel, merge_state
from tests.runtime_ext.plugin.shared_prefix.trees import random_batch


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), heads=HEADS, min_saved=st.sampled_from([1, 20]))
def test_steps_are_attended_to_as_by_one_pass(seed: int, heads: tuple[int, int], min_saved: int) -> None:
    batch = random_batch(seed)
    rows = torch.arange(len(batch.lens)).flip(0) + 2
    table = torch.zeros(len(batch.lens) + 2, batch.rows.shape[1], dtype=torch.int32)
    table[rows] = batch.rows
    own, shared = PagedKernel(is_decode=True), PagedKernel(is_decode=False)
    cascade = Cascade(own, shared, merge_state, Shape(*heads, DIM, torch.float32, torch.float32))
    first = [max(1, one - 1) for one in batch.lens]
    sharing = find_sharing(batch.rows, [one - 1 for one in first], min_saved)
    if not sharing.stretches:
        return
    for lens in (first, batch.lens):  # the next step has one more token each
        queries, keys, values = tensors(batch, len(lens), heads, seed)
        cascade.plan(sharing, table, rows, lens)
        got = cascade.forward(queries, (keys, values), sm_scale=SCALE, logits_soft_cap=0.0)
        for number, end in enumerate(lens):
            slots = batch.rows[number, :end].long()
            assert torch.allclose(got[number], reference(queries[number], keys[slots], values[slots]))
    assert (own.num_plans, shared.num_plans) == (2, 1)


@given(seed=st.integers(0, 2**32))
def test_the_stretches_of_a_level_have_no_request_in_common(seed: int) -> None:
    batch = random_batch(seed)
    sharing = find_sharing(batch.rows, [one - 1 for one in batch.lens], 1)
    levels = levels_of(sharing)
    assert sorted(id(one) for level in levels for one in level) == sorted(map(id, sharing.stretches))
    for level in levels:
        members = [one for stretch in level for one in stretch.members]
        assert len(members) == len(set(members))


@pytest.mark.parametrize("size", [1, 5])
def test_the_experiment_measures_both_and_their_errors(size: int) -> None:
    kernels = Kernels(
        "cpu",
        decode=lambda: PagedKernel(is_decode=True),
        prefill=lambda: PagedKernel(is_decode=False),
        merge=merge_state,
        synchronize=lambda: None,
    )
    found = measure(kernels, Shape(4, 2, 128, torch.float32, torch.float32), size, 40, repeats=2)
    assert found["layer_us"].keys() == ({"stock", "cascade"} if size > 1 else {"stock"})
    assert max(found["largest_error"].values()) < 1e-9
    assert found["kv_read_ratio"] == size * 104 / (40 + size * 64)


def test_a_token_of_llama_3_8b_has_4096_bytes_per_layer() -> None:
    assert Shape(32, 8, 128, torch.bfloat16, torch.bfloat16).token_bytes == 4096
