"""Sharing is looked for when it can have changed, and only then."""

import torch

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import tokens_to_save
from preble_sgl.runtime_ext.plugin.shared_prefix.watch import SETTLING_STEPS, Watch

TABLE = torch.tensor([[0, 1, 2, 3, 10, 11, 12], [0, 1, 2, 3, 20, 21, 22]])


class Table:
    """Counts how often it is looked at."""

    def __init__(self) -> None:
        self.rows, self.num_looks = TABLE, 0

    def __call__(self) -> torch.Tensor:
        self.num_looks += 1
        return self.rows


def test_nothing_is_read_while_the_same_requests_decode() -> None:
    watch, table = Watch(4), Table()
    found = [watch.look(["a", "b"], [5 + step, 5 + step], table).saved for step in range(3)]
    assert (found, table.num_looks) == ([4, 4, 4], 1)
    assert watch.look(["a"], [8], table).saved == 0


def test_a_question_of_the_same_step_is_answered_as_before() -> None:
    watch, table = Watch(4), Table()
    watch.after_prefill()
    assert watch.look(["a", "b"], [5, 5], table) is watch.look(["a", "b"], [5, 5], table)
    assert table.num_looks == 1


def test_after_a_prefill_it_looks_until_slots_have_settled() -> None:
    watch, table = Watch(4), Table()
    for step in range(5):
        watch.after_prefill() if step == 1 else None
        watch.look(["a", "b"], [5 + step, 5 + step], table)
    assert table.num_looks == 1 + SETTLING_STEPS


def test_what_a_stretch_must_save_is_a_matter_of_bytes() -> None:
    assert tokens_to_save(1 << 18, per_token=2 * 64) == 2048
    assert tokens_to_save(1 << 18, per_token=2 * 8 * 128) == 128
    assert tokens_to_save(100, per_token=2 * 33) == 2
