"""Find everything that a launched runtime occupies, and wait until all of it is gone."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from preble_sgl.runtime_ext import guard


@dataclass(frozen=True)
class Footprint:
    """The processes, shared memory and temporary folders of all runtimes that serve one model."""

    processes: frozenset[Path]
    shared_memory: frozenset[Path]
    folders: frozenset[Path]

    def remains(self) -> list[Path]:
        """Return what still exists. A process that is gone but not yet reaped by its parent counts."""
        return [path for path in sorted(self.processes | self.shared_memory | self.folders) if path.exists()]

    async def wait_gone(self) -> None:
        """Wait until nothing is left; fail with what is."""
        for _ in range(600):
            if not self.remains():
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"left behind: {self.remains()}")


def footprint(model_path: Path, folders: Path) -> Footprint:
    """Return what belongs to the guards of this model; `folders` is where they have theirs."""
    guards = guards_of(model_path)
    pids = {pid for guard_pid in guards for pid in guard.descendants(guard_pid)}
    return Footprint(
        processes=frozenset(Path(f"/proc/{pid}") for pid in pids | set(guards)),
        shared_memory=frozenset(guard.shared_memory(pids)),
        folders=frozenset(folders.glob("preble_sgl-*")),
    )


def guards_of(model_path: Path) -> list[int]:
    """Return the guards whose command names the model."""
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if _guards(process, model_path)]


def _guards(process: Path, model_path: Path) -> bool:
    try:
        command = (process / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return guard.__file__ in command and str(model_path) in command
