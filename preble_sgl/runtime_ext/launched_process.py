"""One SGLang runtime that is ours, of which nothing is left behind.

It runs under a guard (guard.py) that ends it when this process lets go of it, for whatever reason. So nothing
is ever killed from here: a guard is started, its runtime is waited for, and at the end the guard's pipe is
closed and the guard waited for.
"""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from preble_sgl.errors import LaunchError
from preble_sgl.runtime_ext import guard
from preble_sgl.runtime_ext.client import SglangRuntime, is_ready, open_session, read_settings
from preble_sgl.runtime_ext.environment import child_environment
from preble_sgl.runtime_ext.launch_spec import LaunchSpec, server_command
from preble_sgl.runtime_ext.plugin.contract import NEEDS, Feature, broken_features
from preble_sgl.runtime_ext.ports import HOST, Ports, choose_ports, free_ports
from preble_sgl.sim.wait_queue import STOCK_ORDERS

log = logging.getLogger("preble_sgl")

POLL_S = 0.1
TAIL_LINES = 20
# A GPU runtime gets the time to give back what the driver would not reclaim from a killed process.
GPU_GRACE_S = 30.0
# SGLang looks at SIGTERM only every 5 s, and a CPU runtime has nothing to give back: end it at once.
CPU_GRACE_S = 0.0


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
    def is_alive(self) -> bool:
        """Whether the runtime's process has not ended. Says nothing of whether it answers."""
        return self._guard.poll() is None

    async def wait_ready(self) -> None:
        """Wait until the runtime takes requests. Raises `LaunchError` if it dies or takes too long."""
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

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[SglangRuntime]:
        """Connect to the runtime, which is ready, and empty its cache."""
        order = self._spec.order
        by_priority = order not in STOCK_ORDERS and "order" not in self._features
        async with SglangRuntime.attach(
            self._url, worker_id=self._spec.worker_id, wire_order=order if by_priority else None
        ) as runtime:
            await runtime.flush_cache()  # SGLang's warm-up leaves its prompt behind
            if self._features and runtime.plugin is None:
                log.warning(
                    "runtime %s runs without the plugin although SGLang fits it; its log says why: %s",
                    self._spec.worker_id,
                    self._log_file,
                )
            yield runtime

    async def end(self) -> None:
        """Let the guard end the runtime, and wait until it has left nothing of it."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        while self.is_alive:
            await asyncio.sleep(POLL_S)

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise self._failed(f"ended with status {self._guard.returncode}, see {self._log_file}")

    def _failed(self, what: str) -> LaunchError:
        lines = self._log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        message = f"runtime {self._spec.worker_id} {what}; its log ends:\n"
        return LaunchError(message + "\n".join(lines), worker_id=self._spec.worker_id)


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
