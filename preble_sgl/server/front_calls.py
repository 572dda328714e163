"""In the process with the scheduler: the requests that came to front processes."""

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from preble_sgl.attempts import Attempt, Outcome
from preble_sgl.core import RequestId, Usage, token_ids
from preble_sgl.errors import RequestRejected, RuntimeFaulty, RuntimeLost
from preble_sgl.server.channel import (
    Answered,
    Asked,
    Begun,
    Broke,
    Channel,
    Done,
    FromFront,
    Gone,
    Over,
    Placed,
    Ready,
    Stopped,
)
from preble_sgl.server.errors import told_or_logged
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.wanted import Wanted

FrontChannel: TypeAlias = Channel[FromFront]


class FrontCalls:
    """What every front process asks, carried by the gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._calls: dict[FrontChannel, dict[RequestId, tuple[_Elsewhere, asyncio.Task[None]]]] = {}
        self.num_ready = 0

    def accept(self) -> FrontChannel:
        """Return the near end of a new connection."""
        channel: FrontChannel = Channel(FromFront, self._on_message, self._on_lost)
        self._calls[channel] = {}
        return channel

    def _on_message(self, channel: FrontChannel, message: FromFront) -> None:
        match message:
            case Ready():
                self.num_ready += 1
            case Asked(wanted):
                work = _Elsewhere(channel, wanted)
                task = asyncio.create_task(self._carry(channel, wanted, work))
                self._calls[channel][wanted.request_id] = work, task
            case Answered(path, status, tenant):
                self._gateway.on_answer(path, status, tenant)
            case Gone(request_id, failed):
                self._on_gone(channel, request_id, failed=failed)
            case Begun() | Broke() | Done():
                if call := self._calls[channel].get(message.request_id):
                    call[0].take(message)

    def _on_gone(self, channel: FrontChannel, request_id: RequestId, *, failed: bool) -> None:
        if call := self._calls[channel].get(request_id):
            work, task = call
            if not (failed and work.fail(RequestRejected("its runtime refused it"))):
                task.cancel()

    def _on_lost(self, channel: FrontChannel) -> None:
        for _, task in self._calls.pop(channel).values():
            task.cancel()

    async def _carry(self, channel: FrontChannel, wanted: Wanted, work: "_Elsewhere") -> None:
        try:
            await self._gateway.carry(wanted, work)
        except Exception as error:
            channel.send(_over(wanted.request_id, error))
        finally:
            if calls := self._calls.get(channel):
                del calls[wanted.request_id]


def _over(request_id: RequestId, error: Exception) -> Over:
    refusal = told_or_logged(error, request_id)
    return Over(request_id, refusal.status, str(refusal), refusal.code, refusal.retry_after_s)


@dataclass(slots=True, eq=False)
class _Elsewhere:
    """The `Work` of a request that a front process does."""

    channel: FrontChannel
    wanted: Wanted
    num_tokens: int = 0
    attempt: Attempt | None = None
    outcome: "asyncio.Future[Outcome] | None" = None

    async def run(self, attempt: Attempt) -> Outcome:
        """Have it done on one runtime. Raises RuntimeLost, RuntimeFaulty or RequestRejected."""
        self.attempt, self.outcome = attempt, asyncio.get_running_loop().create_future()
        self.channel.send(_placed(self.wanted.request_id, attempt))
        try:
            return await self.outcome
        except asyncio.CancelledError:
            self.channel.send(Stopped(self.wanted.request_id))
            raise

    def take(self, message: Begun | Broke | Done) -> None:
        """Take news of the attempt under way."""
        if self.attempt is None or self.outcome is None or self.outcome.done():
            return
        match message:
            case Begun(_, assumed):
                (self.attempt.assume_first_token if assumed else self.attempt.on_first_token)()
            case Broke(_, faulty, why, num_tokens):
                self.num_tokens = num_tokens
                kind = RuntimeFaulty if faulty else RuntimeLost
                self.fail(kind(why, worker_id=self.attempt.placement.worker_id))
            case Done(_, cached_tokens, output_tokens, finish_reason):
                usage = Usage(self.wanted.num_prompt_tokens, cached_tokens, output_tokens)
                self.outcome.set_result(Outcome(token_ids(), usage, finish_reason))

    def fail(self, error: Exception) -> bool:
        """End the attempt under way; return whether there was one."""
        if self.outcome is None or self.outcome.done():
            return False
        self.outcome.set_exception(error)
        return True


def _placed(request_id: RequestId, attempt: Attempt) -> Placed:
    placement, info = attempt.placement, attempt.runtime.info
    return Placed(
        request_id,
        attempt.program_id,
        placement.worker_id,
        info.url,
        info.api_key,
        placement.matched_len,
        placement.reason,
        attempt.priority,
        attempt.kv_hints,
        attempt.first_token_in_s,
        attempt.tells_new_only,
    )
