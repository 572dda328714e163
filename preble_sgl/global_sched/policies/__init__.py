"""The policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from preble_sgl.errors import InputError
from preble_sgl.global_sched.policies.least_load import LeastLoad
from preble_sgl.global_sched.policies.preble_e2 import PrebleE2
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, Policy
from preble_sgl.global_sched.policies.round_robin import RoundRobin

__all__ = ["POLICIES", "Decision", "FleetView", "Policy", "make_policy"]

POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {policy.name: policy for policy in (RoundRobin, LeastLoad, PrebleE2)}
)


def make_policy(name: str) -> Policy:
    """Return a new policy. Raises InputError, which lists the names, for an unknown one."""
    if name not in POLICIES:
        raise InputError(f"policy {name!r} does not exist; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
