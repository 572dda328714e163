"""Let a worker leave a fleet: at leisure, or with a notice after which its machine is taken away.

After SpotServe (ASPLOS 2024): in the time of a notice the calls that can finish do, and the others move with
what they have. A token generated here need not be generated elsewhere, so a call that decodes stays until
shortly before the end; one without a token by half of the time moves then. Before all, what only this worker
has cached for calls that are known to come is computed elsewhere, the most valuable first.
"""

import asyncio

import anyio

from preble_sgl.core import WorkerId
from preble_sgl.dispatcher import Dispatcher

MARGIN = 0.1
"""Share of a notice that is kept for the moving itself."""


async def leave(dispatcher: Dispatcher, worker_id: WorkerId, notice_s: float | None) -> None:
    """Place nothing more on a worker, and return when no call runs there."""
    dispatcher.scheduler.on_worker_drain(worker_id, dispatcher.clock())
    dispatcher.dispatch()
    if notice_s is None:
        await dispatcher.wait_idle(worker_id)
    else:
        async with asyncio.TaskGroup() as group:
            rescue = group.create_task(_rescue(dispatcher, worker_id))
            await _move_within(dispatcher, worker_id, notice_s * (1 - MARGIN))
            rescue.cancel()


async def _move_within(dispatcher: Dispatcher, worker_id: WorkerId, seconds: float) -> None:
    """Let what can finish do so, and hand the rest over."""
    for all_of_them in (False, True):
        with anyio.move_on_after(seconds / 2):
            await dispatcher.wait_idle(worker_id)
            return
        dispatcher.hand_over(worker_id, all_of_them=all_of_them)


async def _rescue(dispatcher: Dispatcher, worker_id: WorkerId) -> None:
    """Compute elsewhere what only this worker has, one prefix after the other."""
    found = dispatcher.scheduler.warming.rescue(worker_id) if worker_id in dispatcher.runtimes else []
    for warm_up in found:
        if warm_up.worker_id in dispatcher.runtimes:
            await dispatcher.wait_warm(warm_up.worker_id)
            dispatcher.warm(warm_up)
