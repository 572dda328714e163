"""The live page under `/ui`, and the events that feed it: one picture of the fleet a second."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from fastapi import Depends, FastAPI, Header
from fastapi.responses import HTMLResponse, StreamingResponse

from preble_sgl.core import RequestRecord
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.tenants import Tenant

PAGE = Path(__file__).with_name("page.html")
EVERY_S = 1.0
MOST_NODES = 300
TIMELINE_S = 60.0
NUM_PLACEMENTS = 20
NUM_PROGRAMS = 24


def page_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add the page and its feed. The feed is for admins; the page asks for a key if one is needed."""
    html = PAGE.read_text()
    pictures = Pictures(gateway)

    async def admin(authorization: str | None = Header(None)) -> Tenant:
        return gateway.tenants.admin(authorization)

    @app.get("/ui", summary="The live page", response_class=HTMLResponse)
    async def page() -> str:
        return html

    @app.get("/ui/events", summary="What the live page shows", dependencies=[Depends(admin)])
    async def events() -> StreamingResponse:
        return StreamingResponse(pictures.stream(), media_type="text/event-stream")


class Pictures:
    """Makes each picture once, however many look."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._latest = b""
        self._made_at = float("-inf")

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield a picture every second until the server ends."""
        while not self._gateway.is_closing:
            yield b"data: " + self._picture() + b"\n\n"
            await asyncio.sleep(EVERY_S)

    def _picture(self) -> bytes:
        now = self._gateway.fleet.now()
        if now - self._made_at >= EVERY_S / 2:
            self._latest, self._made_at = orjson.dumps(picture_of(self._gateway, now)), now
        return self._latest


def picture_of(gateway: Gateway, now: float) -> dict[str, Any]:
    """Return what the page shows, as plain values; instants are seconds before now."""
    scheduler = gateway.fleet.scheduler
    snapshot = scheduler.snapshot()
    return {
        "policy": snapshot.policy,
        "num_running": gateway.admission.num_running,
        "num_waiting": gateway.admission.num_waiting + snapshot.num_queued + snapshot.num_held,
        "num_nodes": snapshot.num_nodes,
        "num_programs": len(gateway.programs),
        "workers": [asdict(worker) for worker in snapshot.workers],
        "tree": [asdict(node) for node in scheduler.picture(MOST_NODES)],
        "calls": [*_ended(gateway, now), *_under_way(gateway, now)],
        "placements": [_placed(record, now) for record in list(gateway.recent)[: -NUM_PLACEMENTS - 1 : -1]],
    }


def _ended(gateway: Gateway, now: float) -> list[dict[str, Any]]:
    latest = {record.program_id: record.finished_at for record in gateway.recent}
    shown = set(sorted(latest, key=latest.__getitem__)[-NUM_PROGRAMS:])
    recent = (
        record
        for record in gateway.recent
        if now - record.finished_at < TIMELINE_S and record.program_id in shown
    )
    return [
        {
            "program": record.program_id,
            "worker": record.worker_id,
            "began_ago_s": now - record.submitted_at,
            "ended_ago_s": now - record.finished_at,
        }
        for record in recent
    ]


def _under_way(gateway: Gateway, now: float) -> list[dict[str, Any]]:
    latest = list(gateway.under_way.values())[-NUM_PROGRAMS:]
    return [
        {"program": program_id, "worker": None, "began_ago_s": now - began_at, "ended_ago_s": 0.0}
        for program_id, began_at in latest
    ]


def _placed(record: RequestRecord, now: float) -> dict[str, Any]:
    return {
        "ago_s": now - record.placed_at,
        "program": record.program_id,
        "worker": record.worker_id,
        "reason": record.placement.reason,
        "matched_len": record.placement.matched_len,
        "prompt_tokens": record.usage.prompt_tokens,
        "cached_tokens": record.usage.cached_tokens,
    }
