"""`preble-sgl serve`: an OpenAI-compatible server over a fleet, until the command is ended."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preble_sgl.control import controlled
from preble_sgl.errors import InputError

if TYPE_CHECKING:
    from preble_sgl.fleet import Fleet
    from preble_sgl.opening import Opening

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
        from preble_sgl.server.gateway import Gateway, ServerOptions
        from preble_sgl.server.serve import Listening, make_server
        from preble_sgl.server.tenants import Tenants

        tenants = Tenants.load(self.keys)
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
            server = make_server(Gateway(fleet, tenants, options), listening)
            announcing = asyncio.create_task(self._announce(server, fleet))
            try:
                await server.serve()
            finally:
                announcing.cancel()

    async def _announce(self, server: "object", fleet: "Fleet") -> None:
        from preble_sgl.server.serve import Server

        assert isinstance(server, Server), "the server that serves"
        port = await server.wait_started()
        scheme = "https" if self.certificate else "http"
        for worker in fleet.describe_workers():
            print(f"worker {worker['worker_id']}: {worker['url']}")
        print(f"serving OpenAI's API on {scheme}://{self.host}:{port}/v1, docs under /docs", flush=True)
