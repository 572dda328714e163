"""Random batches whose requests share prefixes, as tables of KV slots."""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """`rows[i][: lens[i]]` are the slots of request i; its first `shared[i]` tokens are nodes of the tree."""

    rows: torch.Tensor
    lens: list[int]
    shared: list[int]
    num_slots: int


def random_batch(seed: int, most_requests: int = 12, depth: int = 4, longest: int = 30) -> Batch:
    """Return requests on random paths through a tree of up to `depth` levels, each with tokens of its own."""
    rng = random.Random(seed)
    num_slots = 0

    def slots(num: int) -> list[int]:
        nonlocal num_slots
        num_slots += num
        return list(range(num_slots - num, num_slots))

    nodes: dict[tuple[int, ...], list[int]] = {}
    paths = []
    for _ in range(rng.randint(1, most_requests)):
        path: list[int] = []
        taken: tuple[int, ...] = ()
        for _ in range(rng.randint(0, depth)):
            taken = (*taken, rng.randint(0, 1))
            path += nodes.setdefault(taken, []) or nodes[taken].__iadd__(slots(rng.randint(1, longest)))
        paths.append((path, slots(rng.randint(1, longest))))
    lens = [len(path) + len(own) for path, own in paths]
    rows = torch.zeros(len(paths), max(lens), dtype=torch.int32)
    for number, (path, own) in enumerate(paths):
        rows[number, : lens[number]] = torch.tensor(path + own)
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed)).int()
    return Batch(order[rows.long()], lens, [len(path) for path, _ in paths], num_slots)
