"""When a failed call is made again: only when the user says so, and only for the errors named."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from preble_sgl.errors import PrebleError

T = TypeVar("T")

MOST_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Make a call at most `attempts` times while it fails with one of the errors `on`.

    Between attempts passes a random time, at most `backoff_s` seconds times 1, 2, 4, ... and 30. A
    sampled text is drawn anew each time. An output that does not fit its type is an error like any other.
    """

    attempts: int = 3
    backoff_s: float = 0.5
    on: tuple[type[Exception], ...] = (PrebleError,)

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_s < 0:
            raise ValueError("retry: at least 1 attempt and no negative backoff_s")

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what an attempt returns, or raise what the last one raised."""
        if self.attempts == 1:
            return await attempt()
        import tenacity

        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_random_exponential(self.backoff_s, max=MOST_BACKOFF_S),
            retry=tenacity.retry_if_exception_type(self.on),
            reraise=True,
        )
        return await attempts(attempt)


NEVER = Retry(attempts=1)
