"""The order of the wait queue inside one runtime. Pure: an order is a function of what waits.

The engine model and the plugin inside SGLang use the same functions.

- `fcfs`: as they came.
- `lpm`, longest prefix match, as SGLang: most cached tokens first. Of requests with next to nothing cached
  that begin alike only the first keeps its place, so that the others find what it computes (in-batch
  sharing). With more than MAX_MATCHED waiting, SGLang matches nothing and takes them as they stand.
- `preble_groups`, Preble's local scheduler (its section 3): NUM_GROUPS groups by cached share of the prompt;
  in turns, as many of each group as its number says, so that well cached requests go first and none starves.
- `las`, least attained service: first the request whose *program* was served least, as PLAS in Autellix.
- `mlfq`, multi-level feedback in the manner of FastServe, on programs: levels of doubling width by what the
  program was served and the prompt misses, so that a long prompt joins low; as they came within a level.
- `spf`, shortest predicted first, in the manner of ALISE, of embedding-based and of learning-to-rank
  schedulers: least missing prompt and predicted output first. Who predicts is open; by default the call site.

Runtimes do not preempt what runs for these, so an order decides only who is let in next. `las`, `mlfq` and
`spf` could let one wait for ever: who was overtaken by AGING_LEN tokens goes first. Tokens and not seconds,
because the ranks of a tensor-parallel runtime must order alike and have no common clock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

WaitOrder = Literal["fcfs", "lpm", "preble_groups", "las", "mlfq", "spf"]

STOCK_ORDERS: tuple[WaitOrder, ...] = ("fcfs", "lpm")
"""Orders that SGLang has itself."""
MAX_MATCHED = 128
SHARED_LEN = 32
"""Tokens: who has no more than so many cached is checked against the others for so many in common."""
NUM_GROUPS = 10
AGING_LEN = 100_000
"""Prompt tokens that the runtime may compute for others before a request goes first."""
FIRST_LEVEL_LEN = 512
"""Tokens of service up to which a program is in `mlfq`'s first level; each further one is twice as wide."""
OUTPUT_WEIGHT = 8
"""Prompt tokens that take as long as one output token in a batch of tens, by the profiles of both GPUs."""
MAX_PROGRAMS = 65536


class Waiting(Protocol):
    """What an order looks at.

    `beginning`: namespace and first SHARED_LEN tokens; None for a short prompt. `number`: of its arrival.
    `served_len`: tokens computed here for its program's earlier requests. `expected_len`: output tokens to
    expect. `waited_len`: prompt tokens computed here since it came.
    """

    @property
    def matched_len(self) -> int: ...
    @property
    def total_len(self) -> int: ...
    @property
    def beginning(self) -> object: ...
    @property
    def number(self) -> int: ...
    @property
    def served_len(self) -> int: ...
    @property
    def expected_len(self) -> float: ...
    @property
    def waited_len(self) -> int: ...


W = TypeVar("W", bound=Waiting)
Predictor: TypeAlias = Callable[[Waiting], float]
"""Returns the output tokens to expect of a request."""


def ordered(order: WaitOrder, waiting: Sequence[W]) -> list[W]:
    """Return who goes first. O(n log n)."""
    if order == "fcfs":
        return list(waiting)
    if order == "lpm":
        return by_longest_match(waiting) if len(waiting) <= MAX_MATCHED else list(waiting)
    came = sorted(waiting, key=_number)
    if order == "preble_groups":
        return by_groups(came)
    return aged_first(came) + ORDERS[order]([one for one in came if not _is_aged(one)])


def by_longest_match(waiting: Sequence[W]) -> list[W]:
    """Return the order of `lpm`. O(n log n)."""
    seen: set[object] = set()
    first: list[W] = []
    later: list[W] = []
    for one in waiting:
        if one.matched_len <= SHARED_LEN and one.beginning is not None:
            (later if one.beginning in seen else first).append(one)
            seen.add(one.beginning)
        else:
            first.append(one)
    first.sort(key=_least_matched_last)
    return first + later


def by_groups(waiting: Sequence[W]) -> list[W]:
    """Return the order of `preble_groups`: turns of 10 of group 10, 9 of group 9, ... 1 of group 1. O(n)."""
    groups: list[deque[W]] = [deque() for _ in range(NUM_GROUPS + 1)]
    for one in waiting:
        groups[group_of(one)].append(one)
    ordered: list[W] = []
    while len(ordered) < len(waiting):
        for number in range(NUM_GROUPS, 0, -1):
            group = groups[number]
            ordered.extend(group.popleft() for _ in range(min(number, len(group))))
    return ordered


def group_of(one: Waiting) -> int:
    """Return the group of a request, 1 to NUM_GROUPS: 63 of 100 tokens cached are in group 6."""
    return _group(one.matched_len, one.total_len)


def by_least_service(waiting: Sequence[W]) -> list[W]:
    """Return the order of `las`: those of the least served programs first. O(n log n)."""
    return sorted(waiting, key=lambda one: one.served_len)


def by_level(waiting: Sequence[W]) -> list[W]:
    """Return the order of `mlfq`. O(n log n)."""
    return sorted(waiting, key=level_of)


def level_of(one: Waiting) -> int:
    """Return the level that a request joins, from 0: up to 512 tokens of service, to 1024, to 2048, …"""
    return _level(one.served_len + one.total_len - one.matched_len)


def by_predicted_length(waiting: Sequence[W], predict: Predictor | None = None) -> list[W]:
    """Return the order of `spf`, with the output that `predict` says, or else what the caller expects."""

    def predicted(one: Waiting) -> float:
        output_len = predict(one) if predict else one.expected_len
        return _work(one.total_len - one.matched_len, output_len)

    return sorted(waiting, key=predicted)


def aged_first(waiting: Sequence[W]) -> list[W]:
    """Return those who were overtaken for long enough, as they came."""
    return [one for one in waiting if _is_aged(one)]


ORDERS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "las": by_least_service,
    "mlfq": by_level,
    "spf": by_predicted_length,
}


class Served:
    """Tokens that were computed for each program: missing prompt and output of its finished requests.

    Remembers the MAX_PROGRAMS that were served last.
    """

    def __init__(self) -> None:
        self._lens: dict[str, int] = {}

    def add(self, program_id: str, num_tokens: int) -> None:
        """Count tokens for a program. O(1)."""
        self._lens[program_id] = self._lens.pop(program_id, 0) + num_tokens
        if len(self._lens) > MAX_PROGRAMS:
            del self._lens[next(iter(self._lens))]

    def __getitem__(self, program_id: str) -> int:
        return self._lens.get(program_id, 0)


def wire_priority(
    order: WaitOrder, *, matched_len: int, total_len: int, served_len: int, expected_len: float
) -> int:
    """Return the nearest that SGLang's own priorities (higher first) come to an order without the plugin.

    They are strict: nothing ages, and groups take no turns.
    """
    missing_len = total_len - matched_len
    match order:
        case "preble_groups":
            return _group(matched_len, total_len)
        case "las":
            return -served_len
        case "mlfq":
            return -_level(served_len + missing_len)
        case "spf":
            return -round(_work(missing_len, expected_len))
    return 0


def _group(matched_len: int, total_len: int) -> int:
    return max(1, NUM_GROUPS * matched_len // total_len)


def _level(service_len: int) -> int:
    return max(0, (service_len - 1) // FIRST_LEVEL_LEN).bit_length()


def _work(missing_len: int, output_len: float) -> float:
    """Return what a request takes, in prompt tokens."""
    return missing_len + OUTPUT_WEIGHT * output_len


def _is_aged(one: Waiting) -> bool:
    return one.waited_len >= AGING_LEN


def _number(one: Waiting) -> int:
    return one.number


def _least_matched_last(one: Waiting) -> int:
    return -one.matched_len
