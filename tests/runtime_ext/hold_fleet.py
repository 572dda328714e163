"""A program that holds a supervised fleet until it is ended from outside: `python -m ... MODEL_PATH`.

Prints `up` once the runtime is ready, and `clean` when Ctrl-C has run its course.
"""

import asyncio
import contextlib
import sys
from pathlib import Path

from preble_sgl.fleet import Fleet


async def hold(model_path: Path) -> None:
    async with Fleet.launch(model_path, runtimes=1):
        print("up", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(hold(Path(sys.argv[1])))
    print("clean", flush=True)
