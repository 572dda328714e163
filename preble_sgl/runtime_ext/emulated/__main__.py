"""One emulated runtime as a process: `python -m preble_sgl.runtime_ext.emulated PORT`.

Reads its configuration as one line of JSON from standard input, a pipe, and ends when that closes: whoever
started it cannot be outlived by it. Writes one line of JSON: `{"url": ...}`, or `{"error": ...}` and ends.
"""

import asyncio
import signal
import sys

import orjson

from preble_sgl.errors import InputError, PrebleError
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.server import emulated_runtime


async def serve(config: EmulatedConfig, port: int) -> None:
    """Serve until told to stop, or until standard input closes."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with emulated_runtime(config, port=port) as url:
        loop.add_reader(sys.stdin, stop.set)
        _say({"url": url})
        await stop.wait()


def main() -> int:
    """Run, and return the exit status."""
    config = EmulatedConfig.from_json(sys.stdin.buffer.readline())
    try:
        asyncio.run(serve(config, int(sys.argv[1])))
    except (InputError, PrebleError) as error:
        _say({"error": str(error)})
        return 2
    return 0


def _say(message: dict[str, str]) -> None:
    sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
