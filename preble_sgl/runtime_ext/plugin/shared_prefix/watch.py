"""What the requests that decode share, looked for again only when it can have changed."""

from collections.abc import Callable

import torch

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing, find_sharing, still_holds

SETTLING_STEPS = 2
"""After a prefill, SGLang may still put requests on the slots of others that computed the same."""


class Watch:
    """The sharing of the running batch.

    `min_saved`: tokens that a stretch must save to pay. `verifies`: compare the slots in each step, which is
    cheap where the table of slots is at hand; otherwise it relies on SGLang's leaving requests on their slots
    from one prefill to the next.
    """

    def __init__(self, min_saved: int, *, verifies: bool) -> None:
        self._min_saved = min_saved
        self._verifies = verifies
        self._requests: list[str] = []
        self._lens: list[int] = []
        self._sharing = Sharing((), ())
        self._settling = 0

    def after_prefill(self) -> None:
        """Look again in the next steps."""
        self._settling = SETTLING_STEPS

    def look(self, requests: list[str], lens: list[int], rows: Callable[[], torch.Tensor]) -> Sharing:
        """Return what the requests of a decode step share of all but their last token.

        `rows` returns their slots, (requests, positions), on the CPU. O(1) tensor operations per stretch if
        nothing has changed. Asked twice in a step, it says the same.
        """
        if (requests, lens) != (self._requests, self._lens):
            if self._has_changed(requests, rows):
                self._sharing = find_sharing(rows(), [one - 1 for one in lens], self._min_saved)
            self._requests, self._lens = requests, lens
        return self._sharing

    def _has_changed(self, requests: list[str], rows: Callable[[], torch.Tensor]) -> bool:
        if requests != self._requests or self._settling:
            self._settling = max(0, self._settling - 1)
            return True
        return self._verifies and not still_holds(self._sharing, rows())
