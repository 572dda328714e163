"""The routes, and their documentation under `/docs`.

Routes that are placed never reach FastAPI: `FrontDoor` hands them to `Front.answer` as they are.
FastAPI documents them.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import preble_sgl
from preble_sgl.errors import InputError, PrebleError, UnknownIdError
from preble_sgl.runtime_ext.tasks import running
from preble_sgl.server.admin_api import admin_routes
from preble_sgl.server.endpoints import PLACED, Endpoint
from preble_sgl.server.errors import ApiError, told
from preble_sgl.server.front import Front
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.http import ASGIApp, Receive, Scope, Send, read_body
from preble_sgl.server.page import page_routes
from preble_sgl.server.programs_api import program_routes
from preble_sgl.server.prompts import Prompts
from preble_sgl.server.tenants import Tenant
from preble_sgl.server.traces import Traces

PASSED_ON = (
    ("GET", "/v1/models", "The models that are served"),
    ("GET", "/model_info", "What the runtimes say of the model"),
    ("POST", "/tokenize", "Tokens of a text or a chat"),
    ("POST", "/detokenize", "The text of tokens"),
    ("POST", "/v1/tokenize", "Tokens of a text or a chat"),
    ("POST", "/v1/detokenize", "The text of tokens"),
)
"""Routes that any runtime can answer."""

TOLD_SETTINGS = (
    *("model_path", "served_model_name", "version", "device", "max_total_num_tokens", "page_size"),
    *("max_req_input_len", "incremental_streaming_output"),
)
"""Of a runtime's settings, what is nobody's secret: they hold its keys, too."""


class FrontDoor:
    """A process's ASGI application: what is placed goes straight to its front, the rest to `rest`."""

    def __init__(self, front: Front, rest: ASGIApp) -> None:
        self._front = front
        self._rest = rest
        self._placed = {endpoint.path: endpoint for endpoint in PLACED}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's request."""
        endpoint = self._placed.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is not None and scope["method"] == "POST":
            await self._front.answer(endpoint, scope, receive, send)
        else:
            await self._rest(scope, receive, send)


def one_process_app(gateway: Gateway, traces: Traces) -> FrontDoor:
    """Return the application of a server that is one process."""
    front = Front(gateway, Prompts(gateway.fleet.chat), gateway.tenants, gateway.options, traces)
    return FrontDoor(front, documented_app(gateway))


def documented_app(gateway: Gateway) -> FastAPI:
    """Return the routes. The lifespan is that of what runs beside the requests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(gateway.programs.sweep()):
            yield

    app = FastAPI(title="preble_sgl", version=preble_sgl.__version__, lifespan=lifespan)
    for endpoint in PLACED:
        app.router.routes.append(_placed(endpoint))
    for method, path, summary in PASSED_ON:
        app.router.routes.append(_passed_on(gateway, method, path, summary))
    _reports(app, gateway)
    program_routes(app, gateway)
    admin_routes(app, gateway)
    page_routes(app, gateway)
    _refusals(app)
    return app


def _placed(endpoint: Endpoint) -> APIRoute:
    """Return a route for the documentation, and to say which method it takes."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": True}
    if endpoint.required:
        schema["required"] = [endpoint.required]
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return _documented(endpoint.path, "POST", endpoint.summary, {"requestBody": body})


def _documented(path: str, method: str, summary: str, documented: dict[str, Any]) -> APIRoute:
    async def documented_only() -> None: ...

    responses: dict[int | str, dict[str, Any]] = {
        status.value: {"description": status.phrase}
        for status in (
            *(HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
            *(HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE),
        )
    }
    return APIRoute(
        path,
        documented_only,
        methods=[method],
        summary=summary,
        name=f"{method} {path}",
        openapi_extra=documented,
        responses=responses,
    )


def _passed_on(gateway: Gateway, method: str, path: str, summary: str) -> APIRoute:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            gateway.tenants.of(request.headers.get("authorization"))
            body = await read_body(receive, gateway.options.limits)
            async with gateway.fleet.any_runtime().forward(
                method, path.lstrip("/"), body or None
            ) as upstream:
                content, kind = await upstream.read(), upstream.headers.get("content-type")
            response = Response(content, upstream.status, media_type=kind)
        except (ApiError, PrebleError) as error:
            response = _refusal(told(error))
        await response(scope, receive, send)

    schema = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    route = _documented(path, method, summary, {"requestBody": schema} if method == "POST" else {})
    route.app = answer
    return route


def _reports(app: FastAPI, gateway: Gateway) -> None:
    """Add what the server says of itself."""

    @app.get("/health", summary="Whether this process lives")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Whether requests are answered: a runtime is up, and the server is not ending")
    @app.get("/readiness", include_in_schema=False)
    async def ready() -> JSONResponse:
        num_workers = len(gateway.fleet.worker_ids)
        is_ready = num_workers > 0 and not gateway.is_closing
        status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"ready": is_ready, "num_workers": num_workers}, status)

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        text = gateway.metrics.text(gateway.fleet.scheduler.snapshot(), gateway.admission)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def who(authorization: str | None = Header(None)) -> Tenant:
        return gateway.tenants.of(authorization)

    @app.get("/server_info", summary="What a client has to know of the runtimes", dependencies=[Depends(who)])
    async def server_info() -> dict[str, Any]:
        async with gateway.fleet.any_runtime().forward("GET", "server_info") as upstream:
            settings = orjson.loads(await upstream.read())
        return {name: settings[name] for name in TOLD_SETTINGS if name in settings}

    @app.get("/v1/loads", summary="What each worker does", dependencies=[Depends(who)])
    async def loads() -> dict[str, Any]:
        workers = gateway.fleet.describe_workers()
        return {
            "num_workers": len(workers),
            "num_running_reqs": gateway.admission.num_running,
            "num_waiting_reqs": gateway.admission.num_waiting,
            "loads": [{name: value for name, value in worker.items() if name != "url"} for worker in workers],
        }


def _refusals(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    async def refuse(request: Request, error: Exception) -> Response:
        return _refusal(told(error))

    async def not_found(request: Request, error: Exception) -> Response:
        return _refusal(ApiError(HTTPStatus.NOT_FOUND, str(error), code="not_found"))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return _refusal(ApiError(HTTPStatus.BAD_REQUEST, f"{place}: {first['msg']}"))

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refusal(ApiError(HTTPStatus(error.status_code), f"{request.url.path}: {error.detail}"))

    app.add_exception_handler(HTTPException, no_route)
    for kind in (ApiError, InputError, PrebleError):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(UnknownIdError, not_found)
    app.add_exception_handler(RequestValidationError, invalid)


def _refusal(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(orjson.dumps({"error": error.content()}), error.status, headers, "application/json")
