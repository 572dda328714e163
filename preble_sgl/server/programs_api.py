"""Program runs over HTTP: announce one with what is known of it, tell of pauses, let go of it."""

from typing import Annotated

from fastapi import Depends, FastAPI, Header
from pydantic import BaseModel, ConfigDict, Field

from preble_sgl.core import PlanHint, TokenIds, new_request_id, token_ids
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.programs import LONGEST_ID, program_id
from preble_sgl.server.tenants import Tenant

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ProgramPlan(BaseModel):
    """What is known of a program run before it runs. All of it is advice."""

    model_config = ConfigDict(extra="forbid")

    program_id: str | None = Field(None, min_length=1, max_length=LONGEST_ID, pattern=r"^[\x21-\x7e]+$")
    kv_tokens: int | None = Field(None, ge=0, le=2**40, description="KV that its calls hold at their widest")
    prefixes: list[str | list[TokenId]] = Field(
        default=[], max_length=64, description="Beginnings of prompts to come, as text or token ids"
    )
    deadline_s: float | None = Field(None, gt=0, le=1e9, description="Seconds in which it should end")
    num_calls: int | None = Field(None, ge=1, le=2**31, description="Calls that it is going to make")
    output_tokens: int | None = Field(None, ge=0, le=2**31, description="That each is expected to generate")


class ProgramOpened(BaseModel):
    """An announced program run: its id goes into `x-preble-program` of each of its calls."""

    program_id: str


class Pause(BaseModel):
    """A program run makes no call for about so long."""

    expected_s: float = Field(ge=0, le=1e9)


class GiveBack(BaseModel):
    """A program run will not use so much of its KV again."""

    num_tokens: int = Field(ge=0, le=2**40)


def program_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes."""
    programs = gateway.programs

    async def who(authorization: str | None = Header(None)) -> Tenant:
        return gateway.tenants.of(authorization)

    Whose = Annotated[Tenant, Depends(who)]

    @app.post("/v1/programs", status_code=201, summary="Announce a program run")
    async def begin(plan: ProgramPlan, tenant: Whose) -> ProgramOpened:
        given = plan.program_id or new_request_id()
        now = gateway.fleet.now()
        programs.begin(
            PlanHint(
                program_id=program_id(tenant.name, given),
                kv_tokens=plan.kv_tokens,
                prefixes=tuple(filter(None, map(_tokens, plan.prefixes))),
                deadline_at=None if plan.deadline_s is None else now + plan.deadline_s,
            ),
            num_calls=plan.num_calls,
            output_tokens=plan.output_tokens,
        )
        return ProgramOpened(program_id=given)

    def _tokens(prefix: str | list[int]) -> TokenIds:
        return gateway.fleet.chat.encode_start(prefix) if isinstance(prefix, str) else token_ids(prefix)

    @app.delete("/v1/programs/{given}", status_code=204, summary="Let go of a program run")
    async def end(given: str, tenant: Whose) -> None:
        programs.end(program_id(tenant.name, given))

    @app.post("/v1/programs/{given}/pause", status_code=204, summary="Tell of a pause, such as a tool's")
    async def pause(given: str, body: Pause, tenant: Whose) -> None:
        name = program_id(tenant.name, given)
        programs.require(name)
        programs.touch(name, for_s=body.expected_s)
        gateway.fleet.pause(name, body.expected_s)

    @app.post(
        "/v1/programs/{given}/give_back", status_code=204, summary="Give KV back that is not used again"
    )
    async def give_back(given: str, body: GiveBack, tenant: Whose) -> None:
        name = program_id(tenant.name, given)
        programs.require(name)
        gateway.fleet.give_back(name, body.num_tokens)
