"""Start SGLang runtimes that are ours and leave nothing of them behind.

Each runtime runs under a guard (guard.py) that ends it when this process lets go of it, for whatever
reason. So the launcher never kills anything: it checks, starts guards, waits until the runtimes are ready,
and at the end closes the guards' pipes and waits for them.
"""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import anyio

from preble_sgl.errors import LaunchError
from preble_sgl.runtime_ext import guard
from preble_sgl.runtime_ext.client import SglangRuntime, is_ready, open_session, read_settings
from preble_sgl.runtime_ext.environment import child_environment
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, check_specs, server_command
from preble_sgl.runtime_ext.plugin.contract import NEEDS, Feature, broken_features
from preble_sgl.runtime_ext.ports import HOST, Ports, choose_ports, free_ports

log = logging.getLogger("preble_sgl")

POLL_S = 0.1
TAIL_LINES = 20
# A GPU runtime gets the time to give back what the driver would not reclaim from a killed process.
GPU_GRACE_S = 30.0
# SGLang looks at SIGTERM only every 5 s, and a CPU runtime has nothing to give back: end it at once.
CPU_GRACE_S = 0.0


@asynccontextmanager
async def launch_runtime(spec: LaunchSpec) -> AsyncIterator[SglangRuntime]:
    """Start one runtime, and stop it at the end; see `launch_runtimes`."""
    async with launch_runtimes([spec]) as (runtime,):
        yield runtime


@asynccontextmanager
async def launch_runtimes(specs: Sequence[LaunchSpec]) -> AsyncIterator[tuple[SglangRuntime, ...]]:
    """Start runtimes side by side, with empty caches, and stop them all at the end.

    No process, shared memory or temporary file of theirs is left, however the body or this process ends;
    only the log of a runtime that dies by itself stays, in the system's temporary directory.

    Raises `InputError` for a spec that cannot work, and `LaunchError` if a requirement is missing or a
    runtime does not become ready; then none is left running.
    """
    async with AsyncExitStack() as stack:
        launched = await stack.enter_async_context(launched_processes(specs))
        yield tuple([await stack.enter_async_context(one.attach()) for one in launched])


@asynccontextmanager
async def launched_processes(specs: Sequence[LaunchSpec]) -> AsyncIterator[list["LaunchedProcess"]]:
    """Start runtimes side by side and end all that are in the list at the end, also those put in later."""
    check_specs(specs)
    launched: list[LaunchedProcess] = []
    try:
        launched += [LaunchedProcess(spec, ports) for spec, ports in zip(specs, _ports(specs), strict=True)]
        await _wait_all_ready(launched)
        yield launched
    finally:
        await end_processes(launched)


class LaunchedProcess:
    """One runtime that we started: its guard, the pipe that holds it, and its log."""

    def __init__(self, spec: LaunchSpec, ports: Ports) -> None:
        self._spec = spec
        self._ports = ports
        self._url = f"http://{HOST}:{ports.http}"
        self._features = _plugin_features(spec)
        folder = Path(tempfile.mkdtemp(prefix="preble_sgl-"))
        scratch = folder / "tmp"
        scratch.mkdir()
        self._log_file = _log_file(spec, folder)
        environment = child_environment(spec.gpus) | {"TMPDIR": str(scratch)} | dict(spec.env)
        if self._features:
            environment |= spec.plugin_settings.environment(environment)
        with _open_log(self._log_file, spec) as log_file:
            self._guard = subprocess.Popen(
                _guard_command(spec, folder, server_command(spec, ports, self._features)),
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @classmethod
    def start_again(cls, spec: LaunchSpec) -> "LaunchedProcess":
        """Start a runtime of a spec that was checked before."""
        return cls(spec, choose_ports(spec.port, free_ports((spec.port,))))

    @property
    def spec(self) -> LaunchSpec:
        """What was started."""
        return self._spec

    @property
    def is_alive(self) -> bool:
        """Whether the runtime's process has not ended. Says nothing of whether it answers."""
        return self._guard.poll() is None

    def attach(self) -> AbstractAsyncContextManager[SglangRuntime]:
        """Return the connection to the runtime."""
        order = self._spec.order
        by_priority = order not in ("lpm", "fcfs") and "order" not in self._features
        return SglangRuntime.attach(
            self._url, worker_id=self._spec.worker_id, wire_order=order if by_priority else None
        )

    async def wait_ready(self) -> None:
        """Wait until the runtime takes requests and its cache is empty.

        Raises `LaunchError` if it dies or takes too long.
        """
        try:
            async with asyncio.timeout(self._spec.startup_timeout_s), open_session(self._url) as session:
                while not await is_ready(session):
                    self._require_alive()
                    await asyncio.sleep(POLL_S)
                settings = await read_settings(session, self._url)
        except TimeoutError:
            raise self._failed(f"was not ready after {self._spec.startup_timeout_s:g} s") from None
        # SGLang goes on when another server took its port, so make sure that it was our own that answered.
        if settings.get("nccl_port") != self._ports.nccl:
            raise self._failed(f"lost port {self._ports.http} to another server")
        async with self.attach() as runtime:
            await runtime.flush_cache()  # SGLang's warm-up leaves its prompt behind
            if self._features and runtime.plugin is None:
                log.warning(
                    "runtime %s runs without the plugin although SGLang fits it; its log says why: %s",
                    self._spec.worker_id,
                    self._log_file,
                )

    def let_go(self) -> None:
        """Tell the guard to end the runtime, without waiting for it."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    async def wait_gone(self) -> None:
        """Wait until the guard has left nothing of the runtime."""
        while self.is_alive:
            await asyncio.sleep(POLL_S)

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise self._failed(f"ended with status {self._guard.returncode}, see {self._log_file}")

    def _failed(self, what: str) -> LaunchError:
        lines = self._log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        message = f"runtime {self._spec.worker_id} {what}; its log ends:\n"
        return LaunchError(message + "\n".join(lines), worker_id=self._spec.worker_id)


async def end_processes(launched: Iterable[LaunchedProcess]) -> None:
    """End runtimes and wait until nothing of them is left, even if this is cancelled."""
    ending = list(launched)
    for one in ending:
        one.let_go()
    with anyio.CancelScope(shield=True):
        for one in ending:
            await one.wait_gone()


async def _wait_all_ready(launched: Iterable[LaunchedProcess]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for one in launched:
                group.create_task(one.wait_ready())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _ports(specs: Sequence[LaunchSpec]) -> list[Ports]:
    free = free_ports({spec.port for spec in specs})
    return [choose_ports(spec.port, free) for spec in specs]


def _plugin_features(spec: LaunchSpec) -> frozenset[Feature]:
    """Return what the plugin can do in the SGLang that is installed, and tell what it cannot."""
    if not spec.plugin:
        return frozenset()
    broken = broken_features()
    for feature, problem in broken.items():
        log.warning("runtime %s starts without the plugin's %s: %s", spec.worker_id, feature, problem)
    return frozenset(NEEDS.keys() - broken.keys())


def _guard_command(spec: LaunchSpec, folder: Path, command: Sequence[str]) -> list[str]:
    grace_s = GPU_GRACE_S if spec.gpus else CPU_GRACE_S
    arguments = [str(os.getpid()), str(grace_s), str(folder)]
    return [sys.executable, "-I", "-S", guard.__file__, *arguments, *command]


def _log_file(spec: LaunchSpec, folder: Path) -> Path:
    if spec.log_dir is None:
        return folder / "log"
    spec.log_dir.mkdir(parents=True, exist_ok=True)
    return spec.log_dir / f"{spec.worker_id}.log"


def _open_log(file: Path, spec: LaunchSpec) -> BinaryIO:
    """Open a log to go on with it; a kept one says where each start begins."""
    opened = file.open("ab")
    if spec.log_dir is not None:
        opened.write(f"---- {spec.worker_id} starts at {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        opened.flush()
    return opened
