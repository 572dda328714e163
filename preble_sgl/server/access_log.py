"""One JSON line per request, when the operator wants them. No key, no prompt, no answer."""

import logging
import sys
from datetime import UTC, datetime

import orjson

from preble_sgl.server.http import Reply
from preble_sgl.server.relay import Ask
from preble_sgl.server.tenants import Tenant

LOG = logging.getLogger("preble_sgl.access")


def write_to_stderr() -> None:
    """Begin to write a line for each request to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def log_answer(path: str, reply: Reply, tenant: Tenant, ask: Ask | None, took_s: float) -> None:
    """Write what became of a request."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    line = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "path": path,
        "status": reply.status,
        "took_s": round(took_s, 4),
        "tenant": tenant.name,
    }
    if ask is not None:
        line["prompt_tokens"] = ask.wanted.num_prompt_tokens
    line |= {name.decode(): value.decode("latin-1") for name, value in reply.headers}
    LOG.info(orjson.dumps(line).decode())
