"""What reading a batch found: its calls, and how much of their prompts they share.

Reuse is counted for one cache that never forgets: the batch's prompts form a prefix tree, and every
token of the tree is computed once. The tree need not be built. In sorted order, what a prompt adds to it
is what lies beyond its common prefix with its predecessor, so one sort and one pass give every count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from preble_sgl.core import PlanHint, ProgramId, TokenIds, common_prefix_len, token_ids
from preble_sgl.dsl.tracer import Trace, TracedCall


@dataclass(slots=True)
class PlanNode:
    """One place in the program's text, over all rows: a node of the prefix tree that `explain` prints.

    `tokens` counts the prompt tokens that come from here over all calls, `new_tokens` those that no
    earlier prompt had; the rest are reused. `texts` is the number of different texts seen here.
    """

    label: str
    calls: int = 0
    tokens: int = 0
    new_tokens: int = 0
    texts: int = 0
    children: "dict[str, PlanNode]" = field(default_factory=dict)

    @property
    def mean_len(self) -> float:
        """Mean length of this stretch of a prompt, in tokens."""
        return self.tokens / self.calls


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls that a batch will make, read before any of them runs. Advice: programs run as written."""

    name: str
    traces: tuple[Trace, ...]

    @property
    def calls(self) -> tuple[TracedCall, ...]:
        """All calls, row by row in program order."""
        return tuple(call for trace in self.traces for call in trace.calls)

    @property
    def prompt_tokens(self) -> int:
        """Sum of all prompt lengths; generations that reappear in a prompt count with their limit."""
        return sum(len(call.request.prompt) for call in self.calls)

    @property
    def reusable_tokens(self) -> int:
        """Prompt tokens that need not be computed, with one cache that never forgets. O(n log n)."""
        return self.prompt_tokens - sum(len(new) for _, new in new_ranges(self.calls))

    @property
    def reuse_rate(self) -> float:
        """Reusable share of all prompt tokens, 0 to 1."""
        return self.reusable_tokens / self.prompt_tokens if self.calls else 0.0

    def hint(self, row: int, program_id: ProgramId) -> PlanHint:
        """Return what the scheduler should know of one row's run: its KV at its widest, and its prefix."""
        calls = self.traces[row].calls
        computed = sum(len(new) for _, new in new_ranges(calls))
        prefix = max((_known_beginning(call) for call in calls), key=len, default=token_ids())
        return PlanHint(
            program_id=program_id,
            kv_tokens=computed + sum(len(call.output) for call in calls),
            prefixes=(prefix,) if prefix else (),
        )

    def tree(self) -> PlanNode:
        """Return the prefix tree by place in the program text: one node per line and role, not per row."""
        root = PlanNode(self.name)
        for call, new in new_ranges(self.calls):
            _count(root, call, new)
        return root

    def explain(self) -> str:
        """Return the plan as text: totals, the shared-prefix tree, and what could not be read."""
        from preble_sgl.dsl.explain import explain

        return explain(self)


def new_ranges(calls: Sequence[TracedCall]) -> Iterator[tuple[TracedCall, range]]:
    """Yield each call with the range of its prompt that no call before it in sorted order has.

    What a call generates is in the cache, too, so outputs take part as prompts that cost nothing. At
    least the last token of a prompt is always computed, and a scored prompt from where scoring starts.
    """
    keyed = sorted(_entries(calls), key=lambda entry: entry[0])
    previous = b""
    for key, call in keyed:
        shared = common_prefix_len(previous, key)
        previous = key
        if call is not None:
            yield call, range(min(shared, reuse_limit(call)), len(call.request.prompt))


def reuse_limit(call: TracedCall) -> int:
    """Return the most prompt tokens of `call` that a runtime can take from its cache."""
    prompt_len = len(call.request.prompt)
    return min(prompt_len, call.request.score_from or prompt_len) - 1


def _known_beginning(call: TracedCall) -> TokenIds:
    """Return a prompt up to the first token that is not generated yet."""
    prompt = call.request.prompt
    return prompt[: next((i for i, token in enumerate(prompt) if token < 0), len(prompt))]


def _entries(calls: Sequence[TracedCall]) -> Iterator[tuple[bytes, TracedCall | None]]:
    for call in calls:
        yield call.request.prompt.tobytes(), call
        if len(call.output) > 1:  # the last token generated has no KV
            yield (call.request.prompt + call.output[:-1]).tobytes(), None


def _count(root: PlanNode, call: TracedCall, new: range) -> None:
    node, start = root, 0
    for label, end in _stretches(call):
        node = node.children.setdefault(label, PlanNode(label))
        node.calls += 1
        node.tokens += end - start
        node.new_tokens += max(0, end - max(start, new.start))
        node.texts += start < end and new.start < end
        start = end


def _stretches(call: TracedCall) -> Iterator[tuple[str, int]]:
    for segment in call.segments:
        yield segment.label, segment.end
    if call.request.score_from is not None:
        yield "choice", len(call.request.prompt)
