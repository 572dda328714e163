"""The global scheduler: places requests on workers by what their caches hold and how loaded they are."""

from preble_sgl.global_sched.admission import Mechanisms
from preble_sgl.global_sched.cache_feed import FeedResult
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.make import make_scheduler
from preble_sgl.global_sched.policies import POLICIES, Decision, Policy, make_policy
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.global_sched.snapshot import FeedSnapshot, SchedulerSnapshot, WorkerSnapshot

__all__ = [
    "POLICIES",
    "CostProfile",
    "Decision",
    "FeedResult",
    "FeedSnapshot",
    "GlobalScheduler",
    "Mechanisms",
    "Policy",
    "SchedulerSnapshot",
    "WorkerSnapshot",
    "make_policy",
    "make_scheduler",
]
