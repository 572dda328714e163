"""What a calibration measures of a server: the points, chosen by what the server has room for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.wire import Settings

Kind = Literal["cold", "hit", "together", "decode"]

OUTPUT_LEN = 64
"""Tokens that each request of a decode batch makes."""
LONGEST = 8192
MAX_PREFILL_TOKENS = 16384
USABLE_SHARE = 0.9
"""The share of the KV cache that a point may fill, so that no measured request waits for an eviction."""


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure: `num_requests` prompts of `new_len` tokens behind `cached_len` cached ones.

    cold: one prompt, nothing cached. hit: one prompt, its beginning cached. together: prompts that are
    prefilled in one iteration. decode: requests with such prompts that generate side by side.
    """

    kind: Kind
    num_requests: int
    new_len: int
    cached_len: int = 0

    def __str__(self) -> str:
        if self.kind == "hit":
            return f"{self.new_len:,} behind {self.cached_len:,}"
        if self.kind == "cold":
            return f"{self.new_len:,}"
        return f"{self.num_requests} x {self.new_len:,}"

    @property
    def kv_tokens(self) -> int:
        """KV that it occupies."""
        output_len = OUTPUT_LEN if self.kind == "decode" else 1
        return self.num_requests * (self.cached_len + self.new_len + output_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a server takes at once, in tokens. `chunk_tokens`: most that it prefills in one iteration."""

    kv_tokens: int
    max_input_len: int
    chunk_tokens: int

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Read them from what the server reports about itself."""
        most = settings.get("max_prefill_tokens") or MAX_PREFILL_TOKENS
        chunk = settings.get("chunked_prefill_size") or 0
        return cls(
            kv_tokens=settings["max_total_num_tokens"],
            max_input_len=settings["max_req_input_len"],
            chunk_tokens=chunk if chunk > 0 else most,
        )

    def allow(self, point: Point) -> bool:
        """Return whether the point can be measured on the server, and on an empty cache."""
        fits_one = point.cached_len + point.new_len < self.max_input_len
        fits_chunk = point.kind != "together" or point.num_requests * point.new_len <= self.chunk_tokens
        return fits_one and fits_chunk and point.kv_tokens <= USABLE_SHARE * self.kv_tokens


@dataclass(frozen=True, slots=True)
class Grid:
    """The lengths and the batches whose combinations are measured."""

    cold: tuple[int, ...]
    contexts: tuple[int, ...]
    suffixes: tuple[int, ...]
    group_lens: tuple[int, ...]
    groups: tuple[int, ...]
    decode_lens: tuple[int, ...]
    batches: tuple[int, ...]

    def points(self) -> Iterator[Point]:
        """Yield the combinations; the hits of one context follow one another."""
        yield from (Point("cold", 1, length) for length in self.cold)
        yield from (Point("hit", 1, new, cached) for cached in self.contexts for new in self.suffixes)
        yield from (Point("together", k, length) for length in self.group_lens for k in self.groups)
        yield from (Point("decode", b, length) for length in self.decode_lens for b in self.batches)


FULL = Grid(
    cold=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, LONGEST),
    contexts=(256, 1024, 4096),
    suffixes=(1, 16, 64, 256, 1024),
    group_lens=(16, 64, 256),
    groups=(4, 8, 16),
    decode_lens=(64, 1024, 4096),
    batches=(1, 2, 4, 8, 16, 32),
)
QUICK = Grid(
    cold=(16, 64, 256, 1024),
    contexts=(256, 1024),
    suffixes=(1, 64),
    group_lens=(64,),
    groups=(4, 16),
    decode_lens=(64, 1024),
    batches=(1, 4, 16),
)


def choose_points(limits: Limits, *, quick: bool) -> tuple[Point, ...]:
    """Return what to measure. Raises InputError if the server has no room for anything."""
    points = tuple(point for point in (QUICK if quick else FULL).points() if limits.allow(point))
    if not points:
        raise InputError(
            f"a server of {limits.kv_tokens} KV tokens and prompts of up to {limits.max_input_len} is too "
            "small to calibrate: start it with more"
        )
    return points
