"""Schedulers by name: a policy, and the mechanisms that belong to the name."""

import random
from dataclasses import replace

from preble_sgl.errors import InputError
from preble_sgl.global_sched.admission import PLAIN, PLAN, Mechanisms, Objective
from preble_sgl.global_sched.policies import make_policy
from preble_sgl.global_sched.scheduler import GlobalScheduler


def make_scheduler(
    name: str,
    *,
    rng: random.Random,
    window_s: float = 180.0,
    prefix_first: bool = True,
    objective: Objective = "throughput",
) -> GlobalScheduler:
    """Return a new scheduler for a name such as `preble_plan`, `sticky` or `sticky@32`.

    `@K` puts the policy behind a limit of K open programs. `preble_plan` comes with all its mechanisms,
    every other policy with none. `objective` says what `preble_plan` is to be good at. Raises InputError
    for an unknown name.
    """
    policy_name, limit = split_name(name)
    mechanisms = PLAN if policy_name == "preble_plan" else PLAIN
    if mechanisms is PLAIN and objective != "throughput":
        raise InputError(f"objective {objective!r} is for preble_plan; {policy_name} has none")
    return GlobalScheduler(
        make_policy(policy_name),
        rng=rng,
        window_s=window_s,
        prefix_first=prefix_first,
        mechanisms=_with(mechanisms, limit, objective),
    )


def check_name(name: str) -> None:
    """Raise InputError unless `make_scheduler` knows the name."""
    make_policy(split_name(name)[0])


def split_name(name: str) -> tuple[str, int | None]:
    """Return the policy's name and the limit of open programs. Raises InputError for a bad limit."""
    policy_name, at, limit = name.partition("@")
    if at and (not limit.isdecimal() or int(limit) < 1):
        raise InputError(f"policy {name!r}: after @ comes the number of open programs, 1 or more")
    return policy_name, int(limit) if at else None


def _with(mechanisms: Mechanisms, limit: int | None, objective: Objective) -> Mechanisms:
    return replace(mechanisms, open_limit=limit, objective=objective)
