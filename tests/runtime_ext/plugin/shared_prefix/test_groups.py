"""What requests share is found from their slots alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import find_sharing
from tests.runtime_ext.plugin.shared_prefix.trees import random_batch


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), min_saved=st.sampled_from([1, 10, 60]))
def test_stretches_are_shared_follow_each_other_and_pay(seed: int, min_saved: int) -> None:
    batch = random_batch(seed)
    sharing = find_sharing(batch.rows, batch.lens, min_saved)
    reached = [0] * len(batch.lens)
    for stretch in sharing.stretches:
        assert stretch.saved >= min_saved
        for one in stretch.members:
            assert stretch.start == reached[one] < stretch.end <= batch.lens[one]
            reached[one] = stretch.end
            same = batch.rows[one, stretch.start : stretch.end]
            assert torch.equal(same, stretch.slots)
    assert tuple(reached) == sharing.own_from


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_all_that_is_shared_is_found(seed: int) -> None:
    batch = random_batch(seed)
    sharing = find_sharing(batch.rows, batch.lens, 1)
    read = sum(stretch.end - stretch.start for stretch in sharing.stretches)
    read += sum(end - start for start, end in zip(sharing.own_from, batch.lens, strict=True))
    used = {int(slot) for row, end in zip(batch.rows, batch.lens, strict=True) for slot in row[:end]}
    assert read == len(used), "each slot is read once"
    assert sharing.saved == sum(batch.lens) - len(used)


def test_a_short_stretch_is_read_with_the_longer_one_behind_it() -> None:
    rows = torch.tensor([[0, 1, 2, 3, 9], [0, 1, 2, 3, 8], [0, 7, 7, 7, 7]])
    sharing = find_sharing(rows, [5, 5, 5], 4)
    (stretch,) = sharing.stretches
    assert (stretch.members, stretch.start, stretch.end) == ((0, 1), 0, 4)
    assert sharing.own_from == (4, 4, 0)


@pytest.mark.parametrize("lens", [[], [3]])
def test_nobody_and_one_alone_share_nothing(lens: list[int]) -> None:
    sharing = find_sharing(torch.zeros(len(lens), 4), lens, 1)
    assert (sharing.stretches, sharing.own_from) == ((), (0,) * len(lens))
