"""A batch with a checkpoint, to be killed: `python -m tests.dsl.killed_batch CHECKPOINT ROWS PAUSE_S`."""

import asyncio
import sys

import preble_sgl as ps


@ps.program
async def square(s: ps.State, i: int, pause_s: float) -> int:
    """Take a moment, then return a number."""
    await s.ask(ps.user(f"What is {i} squared?"))
    await asyncio.sleep(pause_s * (i % 7))
    return i * i


def run(checkpoint: str, num_rows: int, pause_s: float) -> list[int]:
    """Run all rows that the checkpoint does not have."""
    rows = [{"i": i, "pause_s": pause_s} for i in range(num_rows)]
    backend = ps.ScriptedBackend({"*": "no idea"})
    return square.map(rows, fleet=backend, checkpoint=checkpoint, progress=False, concurrency=8).values


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
