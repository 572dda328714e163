"""Every error the package raises on purpose.

    ValueError
    └── InputError           what the user gave cannot be used; the message says what to do
    Exception
    └── PrebleError          the world failed; carries program, call and worker ids where known
        ├── LaunchError      a runtime did not start; ends with the tail of its log
        ├── RuntimeLost      a runtime died or cannot be reached
        ├── RequestRejected  a runtime refused one request
        │   └── RuntimeFaulty    it failed at it, by its fault or the request's
        ├── NoWorkerError    no worker is left that could take a request
        ├── OutputError      a generated text does not fit the declared type
        ├── ToolError        a tool failed, or took too long, more often than it may
        ├── DeadlineError    a row or a call took longer than it may
        └── ReplayMiss       a recording has no answer to a request
    LookupError
    └── UnknownIdError       an id that was never given out, or is already finished

A failed `assert` is our mistake; please report it.
"""

from preble_sgl.core import ProgramId, RequestId, WorkerId


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line and names the remedy."""


class UnknownIdError(LookupError):
    """An id that was never given out, or whose owner is already gone."""


class PrebleError(Exception):
    """Something outside the program failed."""

    def __init__(
        self,
        message: str,
        *,
        program_id: ProgramId | None = None,
        request_id: RequestId | None = None,
        call_path: str | None = None,
        worker_id: WorkerId | None = None,
    ) -> None:
        super().__init__(message)
        self.program_id = program_id
        self.request_id = request_id
        self.call_path = call_path
        self.worker_id = worker_id


class LaunchError(PrebleError):
    """A runtime did not start."""


class RuntimeLost(PrebleError):
    """A runtime died or cannot be reached."""


class RequestRejected(PrebleError):
    """A runtime refused one request (unfit to run, or a queue was full); the runtime lives on."""


class RuntimeFaulty(RequestRejected):
    """A runtime failed at a request: its own fault, if others fail, too."""


class NoWorkerError(PrebleError):
    """No worker is left that could take a request."""


class OutputError(PrebleError):
    """A generated text does not fit the declared type."""


class ToolError(PrebleError):
    """A tool failed, or took too long, more often than it may."""


class DeadlineError(PrebleError):
    """A row or a call took longer than it may."""


class ReplayMiss(PrebleError):
    """A recording has no answer to a request; the message shows where the nearest one differs."""
