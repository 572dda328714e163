"""What a batch that has run teaches the next plan of the same program.

Output lengths and tool durations are in the records. Which way a run went at its decisions is not: plain
Python compares plain strings. But the plan has the calls of every way, so the way is found by the calls that
were made; if those of several ways are the same, each gets an equal share.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

from preble_sgl.dsl.batch import Batch, RowResult
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.tracer import Reading

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan


def learn(profile: ProgramProfile, program: str, batch: Batch[Any], plan: "Plan | None") -> None:
    """Add what a batch has shown to a profile; without a plan, nothing of its decisions."""
    for result in batch.results:
        for call in result.calls:
            if not call.is_duplicate:
                profile.learn_output(program, call.line, call.usage.output_tokens)
        for tool, duration_s in result.tools:
            profile.learn_tool(tool, duration_s)
        if plan is not None and result.ok and result.calls:
            _learn_branches(profile, program, plan.traces[result.index], result)


def _learn_branches(profile: ProgramProfile, program: str, trace: Trace, result: RowResult[Any]) -> None:
    taken = matching(trace, result)
    for reading in taken:
        for decision in reading.decisions:
            option = decision.options[decision.taken]
            profile.learn_branch(program, decision.site, decision.occurrence, option, 1 / len(taken))


def matching(trace: Trace, result: RowResult[Any]) -> list[Reading]:
    """Return the readings that made the same calls as a run."""
    served = Counter(call.path for call in result.calls)
    return [r for r in trace.readings if Counter(call.request.call_path for call in r.calls) == served]
