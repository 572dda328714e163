"""`preble-sgl serve`: an OpenAI-compatible server over a fleet, until the command is ended."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preble_sgl.control import controlled
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.tasks import running

if TYPE_CHECKING:
    from preble_sgl.fleet import Fleet
    from preble_sgl.opening import Opening
    from preble_sgl.server.gateway import Gateway
    from preble_sgl.server.serve import Listening
    from preble_sgl.server.traces import Traces

NEEDED = "pip install 'preble-sgl[server]'"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFleet:
    """What was asked for on the command line."""

    host: str
    port: int
    keys: Path | None
    certificate: Path | None
    private_key: Path | None
    max_running: int
    max_waiting: int
    timeout: float | None
    access_log: bool
    processes: int

    def run(self, fleet: "Opening[Fleet]") -> None:
        """Serve on uvloop until SIGINT or SIGTERM. Raises InputError, LaunchError or RuntimeLost."""
        try:
            import uvicorn  # noqa: F401
            import uvloop
        except ImportError:
            raise InputError(f"the server's packages are missing: {NEEDED}") from None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(fleet))

    async def _serve(self, opening: "Opening[Fleet]") -> None:
        from preble_sgl.server.access_log import write_to_stderr
        from preble_sgl.server.front import ServerOptions
        from preble_sgl.server.gateway import Gateway
        from preble_sgl.server.serve import Listening
        from preble_sgl.server.tenants import Tenants
        from preble_sgl.server.traces import Traces

        tenants, traces = Tenants.load(self.keys), Traces.of_environment()
        if self.host not in LOOPBACK and not tenants.has_keys:
            raise InputError(f"--host {self.host} lets others in: give --keys, to know who they are")
        listening = Listening(
            host=self.host, port=self.port, certificate=self.certificate, private_key=self.private_key
        )
        options = ServerOptions(
            max_running=self.max_running, max_waiting=self.max_waiting, timeout_s=self.timeout
        )
        if self.access_log:
            write_to_stderr()
        async with opening as fleet, controlled(fleet):
            gateway = Gateway(fleet, tenants, options)
            if self.processes == 1:
                await self._in_one_process(gateway, listening, traces)
            else:
                await self._in_several(gateway, listening)

    async def _in_one_process(self, gateway: "Gateway", listening: "Listening", traces: "Traces") -> None:
        from preble_sgl.server.app import one_process_app
        from preble_sgl.server.serve import make_server

        server = make_server(one_process_app(gateway, traces), listening, gateway.close)

        async def announce() -> None:
            self._announce(gateway.fleet, await server.wait_started())

        async with running(announce()):
            await server.serve()

    async def _in_several(self, gateway: "Gateway", listening: "Listening") -> None:
        from preble_sgl.server.front_processes import fronts

        directory = gateway.fleet.chat.directory
        assert directory is not None, "a fleet of runtimes reads its tokenizer from a directory"
        with fronts(
            gateway, listening, model_path=directory, keys=self.keys, access_log=self.access_log
        ) as processes:
            await processes.serve(self.processes, lambda port: self._announce(gateway.fleet, port))

    def _announce(self, fleet: "Fleet", port: int) -> None:
        scheme = "https" if self.certificate else "http"
        for worker in fleet.describe_workers():
            print(f"worker {worker['worker_id']}: {worker['url']}")
        print(f"serving OpenAI's API on {scheme}://{self.host}:{port}/v1, docs under /docs", flush=True)
