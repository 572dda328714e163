"""A span per request for OpenTelemetry, if its own variables say where spans go.

`OTEL_EXPORTER_OTLP_ENDPOINT` turns it on. A span goes on with the trace of the client's `traceparent`, and
the runtime is sent one, which SGLang takes up with `--enable-trace`.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from preble_sgl.errors import InputError
from preble_sgl.server.http import Reply

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NEEDED = "pip install 'preble-sgl[otel]'"
TRACE_HEADERS = (b"traceparent", b"tracestate")


class Traces:
    """Makes the spans; none without a tracer."""

    def __init__(self, tracer: "Tracer | None" = None) -> None:
        self._tracer = tracer

    @classmethod
    def of_environment(cls) -> "Traces":
        """Send spans to where the environment says. Raises InputError if a package is missing for that."""
        if not any(map(os.environ.get, ENDPOINTS)):
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise InputError(f"{ENDPOINTS[0]} is set, but packages are missing: {NEEDED}") from None
        name = os.environ.get("OTEL_SERVICE_NAME", "preble_sgl")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider.get_tracer("preble_sgl"))

    def begin(self, path: str, headers: Mapping[bytes, bytes]) -> "Span | None":
        """Begin a request's span."""
        if self._tracer is None:
            return None
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        given = {name.decode(): headers[name].decode("latin-1") for name in TRACE_HEADERS if name in headers}
        return self._tracer.start_span(f"POST {path}", extract(given), SpanKind.SERVER)


def carried_on(span: "Span | None") -> dict[str, str]:
    """Return the headers that let a runtime go on with a trace."""
    headers: dict[str, str] = {}
    if span is not None:
        from opentelemetry.propagate import inject
        from opentelemetry.trace import set_span_in_context

        inject(headers, set_span_in_context(span))
    return headers


def end(span: "Span | None", reply: Reply, **attributes: Any) -> None:
    """End a span with what was answered and decided."""
    if span is not None:
        told = {name.decode(): value.decode("latin-1") for name, value in reply.headers}
        decided = {name.replace("x-", "", 1).replace("-", "."): value for name, value in told.items()}
        span.set_attributes({**decided, **attributes, "http.response.status_code": reply.status or 0})
        span.end()
