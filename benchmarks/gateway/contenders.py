"""What is raced: no router at all, ours, and the routers that users would pick, each as its own process."""

import asyncio
import os
import subprocess
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from preble_sgl.runtime_ext.ports import free_ports

START_S = 60.0
PEERS = {"sglang-router": ("sglang_router.launch_router",), "smg": ("smg", "launch")}
OURS = {"preble_sgl": 1, "preble_sgl, two processes": 2}
POLICIES = ("cache_aware", "round_robin")


@asynccontextmanager
async def started(command: Sequence[str], ready: str) -> AsyncIterator[None]:
    """Run a process for as long as the context lasts, from when it is ready."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL, env=environment)
    try:
        await _wait_ready(process, ready, command)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _wait_ready(process: Process, url: str, command: Sequence[str]) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"ended before it was ready: {' '.join(command)}")
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


def installed(name: str, directory: Path) -> Path:
    """Return the Python of an environment with a peer, made if it is not there."""
    python = directory / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory / name)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", name], check=True)
    return python


@asynccontextmanager
async def contenders(model: Path, peers: Path, num_runtimes: int = 2) -> AsyncIterator[dict[str, str]]:
    """Start everything; yield the URL of each contender by name."""
    free = free_ports(())
    async with AsyncExitStack() as stack:
        runtimes = []
        for _ in range(num_runtimes):
            port = next(free)
            command = [sys.executable, "-m", "benchmarks.gateway.instant_runtime", str(port), str(model)]
            await stack.enter_async_context(started(command, f"http://127.0.0.1:{port}/ready"))
            runtimes.append(f"http://127.0.0.1:{port}")
        urls = {"direct": runtimes[0]}
        for name, num in OURS.items():
            port = next(free)
            ours = [sys.executable, "-m", "preble_sgl.cli", "serve", "--model-path", str(model)]
            for url in runtimes:
                ours += ["--attach", url]
            ours += ["--port", str(port), "--processes", str(num)]
            await stack.enter_async_context(started(ours, f"http://127.0.0.1:{port}/ready"))
            urls[name] = f"http://127.0.0.1:{port}"
        for name in PEERS:
            python = installed(name, peers)
            for policy in POLICIES:
                port, metrics = next(free), next(free)
                command = _peer(python, name, policy, port, metrics, runtimes)
                await stack.enter_async_context(started(command, f"http://127.0.0.1:{port}/readiness"))
                urls[f"{name} {policy}"] = f"http://127.0.0.1:{port}"
        yield urls


def _peer(
    python: Path, name: str, policy: str, port: int, metrics: int, runtimes: Sequence[str]
) -> list[str]:
    extra = ["--disable-tokenizer-autoload", "--load-monitor-interval", "1"] if name == "smg" else []
    return [
        *(str(python), "-m", *PEERS[name], "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *runtimes, "--policy", policy),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)),
        *("--worker-startup-check-interval", "1", *extra),
    ]
