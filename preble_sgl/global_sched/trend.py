"""Has the queueing time of a prefix doubled? Two running means over consecutive halves of the window.

E2 replicates a prefix when its average queueing time doubles over H. Preble's code compares the two halves
of the window, keeping every sample; here each half is one sum, so a sample costs O(1) and nothing expires.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Half:
    """Queueing times seen in one half window."""

    index: int
    total_s: float = 0.0
    num_samples: int = 0

    @property
    def mean_s(self) -> float:
        """Return the average; 0 without samples."""
        return self.total_s / self.num_samples if self.num_samples else 0.0


class QueueingTrend:
    """Queueing times (submit to first token, in seconds) of one prefix on one worker."""

    __slots__ = ("_half_s", "_new", "_old")

    def __init__(self, window_s: float) -> None:
        self._half_s = window_s / 2
        self._old = Half(-2)
        self._new = Half(-1)

    def add(self, queueing_s: float, now: float) -> None:
        """Count one sample. O(1)."""
        index = int(now // self._half_s)
        if index > self._new.index:
            self._old = self._new if index == self._new.index + 1 else Half(index - 1)
            self._new = Half(index)
        self._new.total_s += queueing_s
        self._new.num_samples += 1

    def doubled_to(self, now: float, min_samples: int) -> float | None:
        """Return the newer half's mean if it is at least twice the older's, both halves well sampled."""
        current = int(now // self._half_s) == self._new.index
        enough = min(self._old.num_samples, self._new.num_samples) >= min_samples
        doubled = self._new.mean_s >= 2 * self._old.mean_s
        return self._new.mean_s if current and enough and doubled else None
