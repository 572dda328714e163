"""Start SGLang runtimes that are ours and leave nothing of them behind.

Each runtime runs under a guard (guard.py) that ends it when this process lets go of it, for whatever
reason. So the launcher never kills anything: it checks, starts guards, waits until the runtimes are ready,
and at the end closes the guards' pipes and waits for them.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from preble_sgl.core import WorkerId
from preble_sgl.errors import InputError, LaunchError
from preble_sgl.runtime_ext import guard
from preble_sgl.runtime_ext.client import SglangRuntime, is_ready, open_session, read_settings
from preble_sgl.runtime_ext.environment import child_environment, gpu_indices, missing_requirements, remedy
from preble_sgl.runtime_ext.model_files import require_model

HOST = "127.0.0.1"
CPU_KV_TOKENS = 65536
POLL_S = 0.1
TAIL_LINES = 20
# A GPU runtime gets the time to give back what the driver would not reclaim from a killed process.
GPU_GRACE_S = 30.0
# SGLang looks at SIGTERM only every 5 s, and a CPU runtime has nothing to give back: end it at once.
CPU_GRACE_S = 0.0
CPU_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mem-fraction-static", "0.1"),
    *("--dtype", "float32"),  # as fast here, and answers do not change with what else runs or is cached
    "--sleep-on-idle",  # or each idle runtime polls with most of a core
)
# Below the kernel's ephemeral ports, one of which may be taken by any connection while a runtime starts.
FREE_PORTS = range(20000, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One runtime to start. `gpu=None` runs it on the CPU; `port=None` takes a free one.

    `kv_tokens` is the size of the KV cache in tokens; `None` leaves it to SGLang on a GPU and means 65536
    on a CPU. `extra_args` go to SGLang's command line last, so they win. A runtime that dies at its start
    is noticed at once; `startup_timeout_s` is for one that hangs.
    """

    model_path: Path
    worker_id: WorkerId
    gpu: int | None = None
    port: int | None = None
    kv_tokens: int | None = None
    extra_args: tuple[str, ...] = ()
    startup_timeout_s: float = 600.0


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
    _check(specs)
    async with AsyncExitStack() as stack:
        launched: list[_Launched] = []
        stack.push_async_callback(_stop_all, launched)
        for spec, ports in zip(specs, _choose_ports(specs), strict=True):
            launched.append(_Launched(spec, ports))
        await _wait_all_ready(launched)
        runtimes = [await stack.enter_async_context(one.attach()) for one in launched]
        for runtime in runtimes:
            await runtime.flush_cache()  # SGLang's warm-up leaves its prompt behind
        yield tuple(runtimes)


@dataclass(frozen=True, slots=True)
class _Ports:
    http: int
    nccl: int


class _Launched:
    """One runtime that we started: its guard, the pipe that holds it, and its log."""

    def __init__(self, spec: LaunchSpec, ports: _Ports) -> None:
        self._spec = spec
        self._ports = ports
        self._url = f"http://{HOST}:{ports.http}"
        folder = Path(tempfile.mkdtemp(prefix="preble_sgl-"))
        scratch = folder / "tmp"
        scratch.mkdir()
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._guard = subprocess.Popen(
                _guard_command(spec, ports, folder),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(spec.gpu) | {"TMPDIR": str(scratch)},
                start_new_session=True,
            )

    def attach(self) -> AbstractAsyncContextManager[SglangRuntime]:
        """Return the connection to the runtime."""
        return SglangRuntime.attach(self._url, worker_id=self._spec.worker_id)

    async def wait_ready(self) -> None:
        """Wait until the runtime takes requests; raises `LaunchError` if it dies or takes too long."""
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

    def let_go(self) -> None:
        """Tell the guard to end the runtime, without waiting for it."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    async def wait_gone(self) -> None:
        """Wait until the guard has left nothing of the runtime."""
        while self._guard.poll() is None:
            await asyncio.sleep(POLL_S)

    def _require_alive(self) -> None:
        status = self._guard.poll()
        if status is not None:
            raise self._failed(f"ended with status {status}, see {self._log}")

    def _failed(self, what: str) -> LaunchError:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        message = f"runtime {self._spec.worker_id} {what}; its log ends:\n"
        return LaunchError(message + "\n".join(lines), worker_id=self._spec.worker_id)


async def _wait_all_ready(launched: Iterable[_Launched]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for one in launched:
                group.create_task(one.wait_ready())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _stop_all(launched: Sequence[_Launched]) -> None:
    for one in launched:
        one.let_go()
    with anyio.CancelScope(shield=True):
        for one in launched:
            await one.wait_gone()


def _guard_command(spec: LaunchSpec, ports: _Ports, folder: Path) -> list[str]:
    grace_s = CPU_GRACE_S if spec.gpu is None else GPU_GRACE_S
    arguments = [str(os.getpid()), str(grace_s), str(folder)]
    return [sys.executable, "-I", "-S", guard.__file__, *arguments, *_server_command(spec, ports)]


def _server_command(spec: LaunchSpec, ports: _Ports) -> list[str]:
    kv_tokens = CPU_KV_TOKENS if spec.kv_tokens is None and spec.gpu is None else spec.kv_tokens
    return [
        *(sys.executable, "-W", "ignore", "-m", "sglang.launch_server"),
        *("--model-path", str(spec.model_path)),
        *("--host", HOST, "--port", str(ports.http), "--nccl-port", str(ports.nccl)),
        *("--schedule-policy", "lpm", "--random-seed", "0"),
        *("--enable-metrics", "--enable-cache-report", "--log-level-http", "warning"),
        *("--incremental-streaming-output", "--constrained-json-disable-any-whitespace"),
        *(CPU_ARGUMENTS if spec.gpu is None else ()),
        *(() if kv_tokens is None else ("--max-total-tokens", str(kv_tokens))),
        *spec.extra_args,
    ]


def _check(specs: Sequence[LaunchSpec]) -> None:
    """Refuse what cannot work before anything is started."""
    _require_distinct("worker_id", (spec.worker_id for spec in specs))
    _require_distinct("port", (spec.port for spec in specs if spec.port is not None))
    for spec in specs:
        require_model(spec.model_path)
        if spec.port is not None and not _is_free(spec.port):
            raise InputError(f"port {spec.port} is in use: choose another, or none to get a free one")
    _require_gpus({spec.gpu for spec in specs if spec.gpu is not None})
    for on_gpu in {spec.gpu is not None for spec in specs}:
        require_installed(gpu=on_gpu)


def require_installed(*, gpu: bool) -> None:
    """Raise LaunchError, with the command that mends it, if SGLang cannot run as installed here."""
    if missing := missing_requirements(gpu):
        problems = "; ".join(need.problem for need in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LaunchError(f"{problems}{more}; run: {remedy(missing)}")


def _require_distinct(what: str, values: Iterable[object]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise InputError(f"{what}={value!r} is given to {count} runtimes: each needs its own")


def _require_gpus(wanted: set[int]) -> None:
    if not wanted:
        return
    present = gpu_indices()
    for gpu in sorted(wanted.difference(present)):
        raise InputError(f"there is no GPU {gpu}; this process may use: {present or 'none'}")


def _choose_ports(specs: Sequence[LaunchSpec]) -> list[_Ports]:
    free = _free_ports({spec.port for spec in specs})
    return [_Ports(next(free) if spec.port is None else spec.port, next(free)) for spec in specs]


def _free_ports(taken: Container[int | None]) -> Iterator[int]:
    """Yield ports that nobody uses, each once, at random so that two launchers rarely meet."""
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if port not in taken and _is_free(port):
            yield port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
