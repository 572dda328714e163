"""How a modelled runtime is set."""

from dataclasses import dataclass
from typing import get_args

from preble_sgl.errors import InputError
from preble_sgl.sim.step_cost import StepCost
from preble_sgl.sim.wait_queue import WaitOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A runtime's settings, named after SGLang's flags. Lengths in tokens.

    `chunk_tokens`: most new tokens in one prefill batch, None for no limit. `max_input_len`: longest prompt,
    None for what fits. `publish_every`: tell cache events at prefills, when idle and every so many decode
    steps (SGLang: 40); None tells nothing. `max_pinned_share`: of the pool, that pins may hold.
    `shared_prefix`: decode steps read KV that several requests share once, not once for each.
    """

    step: StepCost
    kv_tokens: int
    page_size: int = 1
    chunk_tokens: int | None = 8192
    max_prefill_tokens: int = 16384
    max_running: int = 512
    order: WaitOrder = "lpm"
    mixed_chunk: bool = False
    max_input_len: int | None = None
    publish_every: int | None = None
    max_pinned_share: float = 0.3
    shared_prefix: bool = False

    def __post_init__(self) -> None:
        for name in (
            "kv_tokens",
            "page_size",
            "max_prefill_tokens",
            "max_running",
            "max_input_len",
            "publish_every",
        ):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"engine: {name}={value}, must be 1 or more")
        if self.kv_tokens < 4 * self.page_size:
            raise InputError(f"engine: {self.kv_tokens} KV tokens are less than 4 pages of {self.page_size}")
        if self.chunk_tokens is not None and self.chunk_tokens < self.page_size:
            raise InputError(f"engine: chunk_tokens={self.chunk_tokens}, must be a page or more")
        if not 0 <= self.max_pinned_share <= 1:
            raise InputError(f"engine: max_pinned_share={self.max_pinned_share}, must be 0 to 1")
        if self.order not in get_args(WaitOrder):
            raise InputError(f"engine: no order {self.order!r}; there are {', '.join(get_args(WaitOrder))}")
