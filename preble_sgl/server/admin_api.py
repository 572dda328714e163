"""Routes for the operator: list the workers, drain one."""

import asyncio
from typing import Any

from fastapi import Depends, FastAPI, Header
from pydantic import BaseModel, Field

from preble_sgl.core import WorkerId
from preble_sgl.errors import UnknownIdError
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.tenants import Tenant


class Drain(BaseModel):
    """How long there is: without `notice_s` all its calls may finish."""

    notice_s: float | None = Field(None, gt=0, le=1e6)


def admin_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes."""
    draining: set[asyncio.Task[None]] = set()

    async def admin(authorization: str | None = Header(None)) -> Tenant:
        return gateway.tenants.admin(authorization)

    only_admins = [Depends(admin)]

    @app.get("/admin/workers", summary="The workers", dependencies=only_admins)
    async def workers() -> list[dict[str, Any]]:
        return gateway.fleet.describe_workers()

    @app.post("/admin/workers/{worker_id}/drain", status_code=202, dependencies=only_admins)
    async def drain(worker_id: str, body: Drain | None = None) -> dict[str, str]:
        """Place nothing more on a worker, let its calls finish, and let go of it. Answers at once."""
        if worker_id not in gateway.fleet.worker_ids:
            raise UnknownIdError(f"there is no worker {worker_id}")
        work = gateway.fleet.drain(WorkerId(worker_id), notice_s=body.notice_s if body else None)
        task = asyncio.create_task(work)
        draining.add(task)
        task.add_done_callback(draining.discard)
        return {"worker_id": worker_id, "state": "draining"}
