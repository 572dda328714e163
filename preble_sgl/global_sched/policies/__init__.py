"""The policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from preble_sgl.errors import InputError
from preble_sgl.global_sched.policies.cache_aware import CacheAware
from preble_sgl.global_sched.policies.consistent_hash import ConsistentHash
from preble_sgl.global_sched.policies.dynamo_linear import DynamoLinear
from preble_sgl.global_sched.policies.least_load import LeastLoad
from preble_sgl.global_sched.policies.lmetric import LMetric
from preble_sgl.global_sched.policies.power_of_two import PowerOfTwo
from preble_sgl.global_sched.policies.preble_e2 import PrebleE2
from preble_sgl.global_sched.policies.preble_literal import PrebleLiteral
from preble_sgl.global_sched.policies.preble_plan import PreblePlan
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, Observer, Policy
from preble_sgl.global_sched.policies.random_choice import RandomChoice
from preble_sgl.global_sched.policies.round_robin import RoundRobin
from preble_sgl.global_sched.policies.sticky import Sticky

__all__ = ["POLICIES", "Decision", "FleetView", "Observer", "Policy", "make_policy"]

_BASELINES = (RandomChoice, PowerOfTwo, ConsistentHash, Sticky, CacheAware, DynamoLinear, LMetric)

POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        policy.name: policy
        for policy in (PreblePlan, PrebleE2, PrebleLiteral, RoundRobin, LeastLoad, *_BASELINES)
    }
)


def make_policy(name: str) -> Policy:
    """Return a new policy. Raises InputError, which lists the names, for an unknown one."""
    if name not in POLICIES:
        raise InputError(f"policy {name!r} does not exist; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
