"""When a failed call is made again: only when the user says so, and only for the errors named."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from preble_sgl.errors import PrebleError

if TYPE_CHECKING:
    from tenacity import AsyncRetrying

MOST_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Make a call at most `attempts` times while it fails with one of the errors `on`.

    Attempt n begins about `backoff_s * 2 ** (n - 1)` seconds after the one before failed, 30 at most. A
    sampled text is drawn anew each time. An output that does not fit its type is an error like any other.
    """

    attempts: int = 3
    backoff_s: float = 0.5
    on: tuple[type[Exception], ...] = (PrebleError,)

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_s < 0:
            raise ValueError("retry: at least 1 attempt and no negative backoff_s")

    def attempts_of(self) -> "AsyncRetrying":
        """Return the attempts to be made, for `async for attempt in ...`."""
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_random_exponential,
        )

        return AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(self.backoff_s, max=MOST_BACKOFF_S),
            retry=retry_if_exception_type(self.on),
            reraise=True,
        )


NEVER = Retry(attempts=1)
