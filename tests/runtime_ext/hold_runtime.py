"""A program that holds one runtime until it is ended from outside: `python -m ... MODEL_PATH`.

Prints `up` once the runtime is ready, and `clean` when Ctrl-C has run its course.
"""

import asyncio
import contextlib
import sys
from pathlib import Path

from preble_sgl.core import WorkerId
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtime


async def hold(model_path: Path) -> None:
    async with launch_runtime(LaunchSpec(model_path=model_path, worker_id=WorkerId("held"))):
        print("up", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(hold(Path(sys.argv[1])))
    print("clean", flush=True)
