"""What clients are told when they do not get an answer: OpenAI's shape, one clear message."""

import logging
from http import HTTPStatus
from typing import Any

import orjson

from preble_sgl.core import RequestId
from preble_sgl.errors import DeadlineError, InputError, NoWorkerError, PrebleError, RuntimeLost
from preble_sgl.runtime_ext.wire import BROKEN_OFF

log = logging.getLogger("preble_sgl")

RETRY_SOON_S = 2
"""When to ask again while no runtime is up: they are restarted meanwhile."""


class BrokenOff(PrebleError):
    """A runtime was lost when the client had a part of its answer already."""


class ApiError(Exception):
    """An answer that is a refusal. `retry_after_s`: when it is worth asking again."""

    def __init__(
        self, status: HTTPStatus, message: str, *, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What to send besides the body."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(self.retry_after_s).encode())]

    def body(self) -> bytes:
        """Return the body, as OpenAI's clients read it."""
        return orjson.dumps({"error": self.content()})

    def content(self) -> dict[str, Any]:
        """Return what the error says."""
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        return {"message": str(self), "type": kind, "param": None, "code": self.code or self.status.value}


def told_or_logged(error: Exception, request_id: RequestId) -> ApiError:
    """Return what to tell a client of any error; one that we did not foresee is logged."""
    try:
        return told(error)
    except Exception:
        log.exception("request %s failed by a mistake of ours", request_id)
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "this is our mistake; see the log")


def told(error: Exception) -> ApiError:
    """Return what to tell a client of an error of ours; one that we did not foresee is raised again."""
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error))
        case NoWorkerError():
            return ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "no runtime is up: try again",
                code="no_runtime",
                retry_after_s=RETRY_SOON_S,
            )
        case BrokenOff():
            return ApiError(HTTPStatus.BAD_GATEWAY, str(error), code=BROKEN_OFF)
        case RuntimeLost():
            return ApiError(HTTPStatus.BAD_GATEWAY, str(error), code="runtime_lost")
        case DeadlineError() | TimeoutError():
            return ApiError(HTTPStatus.GATEWAY_TIMEOUT, str(error), code="deadline")
        case PrebleError():
            return ApiError(HTTPStatus.BAD_GATEWAY, str(error))
    raise error
