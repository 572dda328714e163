"""Start SGLang runtimes that are ours, for as long as a context lasts."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.supervisor import supervised


@asynccontextmanager
async def launch_runtime(spec: LaunchSpec) -> AsyncIterator[SglangRuntime]:
    """Start one runtime, and stop it at the end; see `launch_runtimes`."""
    async with launch_runtimes([spec]) as (runtime,):
        yield runtime


@asynccontextmanager
async def launch_runtimes(specs: Sequence[LaunchSpec]) -> AsyncIterator[tuple[SglangRuntime, ...]]:
    """Start runtimes side by side, with empty caches, and stop them all at the end. Nobody watches them.

    No process, shared memory or temporary file of theirs is left, however the body or this process ends;
    only the log of a runtime that dies by itself stays, in the system's temporary directory.

    Raises `InputError` for a spec that cannot work, and `LaunchError` if a requirement is missing or a
    runtime does not become ready; then none is left running.
    """
    async with supervised(specs) as supervisor:
        yield supervisor.runtimes
