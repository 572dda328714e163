"""What the requests that decode share, looked for again only when it can have changed."""

from collections.abc import Callable

import torch

from preble_sgl.runtime_ext.plugin.shared_prefix.groups import Sharing, find_sharing

SETTLING_STEPS = 2
"""After a prefill, SGLang may still put requests on the slots of others that computed the same."""


class Watch:
    """The sharing of the running batch; SGLang leaves requests on their slots from one prefill to the next.

    `min_saved`: tokens that a stretch must save to pay.
    """

    def __init__(self, min_saved: int) -> None:
        self._min_saved = min_saved
        self._requests: list[str] = []
        self._lens: list[int] = []
        self._sharing = Sharing((), ())
        self._settling = 0

    def after_prefill(self) -> None:
        """Look again in the next steps."""
        self._settling = SETTLING_STEPS

    def look(self, requests: list[str], lens: list[int], rows: Callable[[], torch.Tensor]) -> Sharing:
        """Return what the requests of a decode step share of all but their last token.

        `rows` returns their slots, (requests, positions), on the CPU; it is called, and another object
        returned, only if they can have changed. Asked twice in a step, it says the same.
        """
        is_asked_again = (requests, lens) == (self._requests, self._lens)
        if not is_asked_again and (requests != self._requests or self._settling):
            self._settling = max(0, self._settling - 1)
            self._sharing = find_sharing(rows(), [one - 1 for one in lens], self._min_saved)
        self._requests, self._lens = requests, lens
        return self._sharing
