"""Which stretches of KV several requests of a batch share, read from the runtime's own table of slots.

Two requests share a stretch where their rows of `req_to_token` name the same slots, so what is found is true,
whatever anybody planned.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Positions `start` to `end` of the requests `members` (indices in the batch), in the same `slots`."""

    members: tuple[int, ...]
    start: int
    end: int
    slots: torch.Tensor

    @property
    def saved(self) -> int:
        """Tokens of KV that need not be read because it is read once."""
        return (len(self.members) - 1) * (self.end - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """The shared stretches of a batch, and from where each request is alone."""

    stretches: tuple[Stretch, ...]
    own_from: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens of KV that are read less, per layer."""
        return sum(stretch.saved for stretch in self.stretches)


def tokens_to_save(least: int, per_token: int) -> int:
    """Return for how many tokens a layer has the `least` KV that pays; `per_token`: that of one token."""
    return -(-least // per_token)


def find_sharing(rows: torch.Tensor, limits: Sequence[int], min_saved: int) -> Sharing:
    """Find what requests share of their first `limits` tokens. `rows`: slots, (requests, positions).

    A stretch pays if it saves the reading of `min_saved` tokens. The stretches of one request follow each
    other without a gap from position 0; one that does not pay by itself is left to the requests that share
    it, or to a longer stretch behind it. O(tokens) compared, once.
    """
    stretches: list[Stretch] = []
    own_from = [0] * len(limits)

    def split(members: list[int], covered: int, at: int) -> None:
        """Go on where `members`, whose stretches end at `covered`, agree up to `at`."""
        for group in _by_slot(rows, members, limits, at):
            end = at + _agreeing(rows, group, at, min(limits[one] for one in group))
            stretch = Stretch(tuple(group), covered, end, rows[group[0], covered:end])
            pays = stretch.saved >= min_saved
            if pays:
                stretches.append(stretch)
                for one in group:
                    own_from[one] = end
            split(group, end if pays else covered, end)

    split(list(range(len(limits))), 0, 0)
    return Sharing(tuple(stretches), tuple(own_from))


def _by_slot(rows: torch.Tensor, members: list[int], limits: Sequence[int], at: int) -> list[list[int]]:
    """Return those of `members` with a token `at`, by its slot; without those that are alone."""
    longer = [one for one in members if limits[one] > at]
    if len(longer) < 2:
        return []
    groups: dict[int, list[int]] = defaultdict(list)
    for one, slot in zip(longer, rows[longer, at].tolist(), strict=True):
        groups[slot].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _agreeing(rows: torch.Tensor, group: list[int], start: int, end: int) -> int:
    """Return in how many positions from `start` all of a group have the same slots."""
    agree = (rows[group, start:end] == rows[group[0], start:end]).all(dim=0)
    return end - start if bool(agree.all()) else int(agree.int().argmin())
