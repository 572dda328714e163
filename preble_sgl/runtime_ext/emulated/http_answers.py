"""What all handlers need of HTTP: JSON, server-sent events, and refusals in SGLang's shapes."""

from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from preble_sgl.errors import InputError, RequestRejected

DONE = b"data: [DONE]\n\n"
NATIVE = ("/generate", "/abort_request", "/flush_cache")


def event(content: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def json_response(content: Any, status: int = HTTPStatus.OK) -> web.Response:
    """Answer with JSON."""
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


async def open_stream(call: web.Request) -> web.StreamResponse:
    """Begin an answer of server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(call)
    return response


class BodyError(InputError):
    """A body that is not what the endpoint takes."""


@web.middleware
async def refuse_clearly(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what cannot be served into one JSON answer, in the shape that SGLang has for the endpoint."""
    try:
        return await handler(request)
    except BodyError as error:
        return _refusal(str(error), "Bad Request")
    except (InputError, RequestRejected) as error:
        if request.path in NATIVE:
            return json_response({"error": {"message": str(error)}}, HTTPStatus.BAD_REQUEST)
        return _refusal(str(error), "BadRequestError")
    except web.HTTPException as error:
        return json_response({"detail": error.reason}, error.status)


def _refusal(message: str, kind: str) -> web.Response:
    status = HTTPStatus.BAD_REQUEST
    shape = {"object": "error", "message": message, "type": kind, "param": None, "code": status.value}
    return json_response(shape, status)
