"""Backends that live as long as a context, in async code or in a thread for code that is not."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from typing import Any, Generic, Protocol, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from preble_sgl.errors import InputError

T = TypeVar("T")


class Bound(Protocol):
    """What has to know the event loop that it lives on."""

    def bind(self, portal: BlockingPortal) -> None:
        """Learn how to reach that loop from other threads."""
        ...


class OnLoop:
    """A backend on an event loop of its own, for code on other threads; `Opening` says which loop that is."""

    _portal: BlockingPortal | None = None

    def bind(self, portal: BlockingPortal) -> None:
        """Learn which event loop it lives on, so that `call` can reach it from other threads."""
        self._portal = portal

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on that event loop and wait, from code that is not async.

        An interrupt cancels it. Raises InputError if the backend was opened in async code.
        """
        if self._portal is None:
            raise InputError("this backend was opened with `async with`: use arun, amap and aplan")
        future = self._portal.start_task_soon(fn)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


B = TypeVar("B", bound=Bound)


class Opening(Generic[B]):
    """A backend to be opened with `async with`, or with `with` from code that is not async.

    In the second case an event loop in a thread of its own runs the backend.
    """

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[B]]) -> None:
        self._opened = opened
        self._async_stack = AsyncExitStack()
        self._stack = ExitStack()

    async def __aenter__(self) -> B:
        return await self._async_stack.enter_async_context(self._opened())

    async def __aexit__(self, *exc_info: Any) -> bool | None:
        return await self._async_stack.__aexit__(*exc_info)

    def __enter__(self) -> B:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            backend = stack.enter_context(portal.wrap_async_context_manager(self._opened()))
            backend.bind(portal)
            self._stack = stack.pop_all()
        return backend

    def __exit__(self, *exc_info: Any) -> bool | None:
        return self._stack.__exit__(*exc_info)
