"""Fairness between tenants: whoever was served least comes next.

A virtual counter per tenant, after the virtual token counter of Sheng et al. ("Fairness in Serving Large
Language Models", OSDI 2024), in worker seconds instead of tokens. A tenant is charged when a request of his
is placed (its prefill that was not cached, and the output to expect), and corrected when it ends. Of the
tenants with something waiting, the one with the lowest counter is next; ties go to the first name. A tenant
that had nothing waiting or running is lifted to the lowest counter of those who have, so that nobody saves
up a right to a burst. As long as two tenants both wait, what they were served differs by at most one request.
"""

from collections.abc import Iterable


class FairShare:
    """What each tenant was served, in worker seconds. Forgets tenants that have nothing to do."""

    def __init__(self) -> None:
        self._served_s: dict[str, float] = {}
        self._num_active: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """Count a request that a tenant has in the house, waiting or running. O(tenants) for the first."""
        if tenant not in self._num_active:
            lowest = min(self._served_s.values(), default=0.0)
            self._served_s[tenant] = lowest
            self._num_active[tenant] = 0
        self._num_active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count a request that left the house; a tenant without any is forgotten."""
        self._num_active[tenant] -= 1
        if not self._num_active[tenant]:
            del self._num_active[tenant], self._served_s[tenant]

    def charge(self, tenant: str, seconds: float) -> None:
        """Add what a tenant was served; negative to correct an estimate."""
        self._served_s[tenant] += seconds

    def least_served(self, tenants: Iterable[str]) -> str:
        """Return the tenant whose turn it is. Raises ValueError when there is none."""
        return min(tenants, key=lambda tenant: (self._served_s[tenant], tenant))
