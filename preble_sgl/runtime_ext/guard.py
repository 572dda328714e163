"""Stand between a launcher and one runtime, so that the runtime cannot outlive the launcher.

The launcher starts this file in a session of its own, which Ctrl-C does not reach, and holds the other end
of its standard input. When that closes, because the launcher wants it so, ends or is killed, the guard ends
every process below it and removes what SGLang leaves behind: shared memory and temporary files.

    python -I -S guard.py PARENT_PID GRACE_S FOLDER COMMAND...

Uses the standard library alone, because it stays in memory as long as the runtime lives.
"""

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.5
REAP_S = 0.02
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY = Path("/dev/shm")
LEFT_BEHIND = ("sgl", "sem.mp-")  # load snapshots and tensors; a lock of its multiprocessing
LAST_MADE = "sglang_loads_"


def main(parent_pid: int, grace_s: float, folder: Path, command: list[str]) -> int:
    """Run `command` until it ends or the launcher does; return its exit status, or 0.

    `folder` holds its log and, under `tmp`, its temporary files. The log stays if the command ended by
    itself, as the evidence.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans below us become our children
    seen: set[Path] = set()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard)
    try:
        while child.poll() is None and not _is_abandoned(parent_pid):
            # Looked for early, because a crash takes with it the only trace of whose memory it was; not
            # again once the last to be made is there, because it means reading all of /proc.
            if not any(file.name.startswith(LAST_MADE) for file in seen):
                seen |= shared_memory(descendants(os.getpid()))
        return child.returncode or 0
    finally:
        remains = folder if child.poll() is None else folder / "tmp"
        _end(child, grace_s, seen)
        shutil.rmtree(remains, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless the log is in it


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_abandoned(parent_pid: int) -> bool:
    """Wait a moment; return whether the launcher closed the pipe or died.

    Its process id is looked at as well, because a fork of the launcher may still hold the pipe open.
    """
    readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
    return bool(readable) or os.getppid() != parent_pid


def _end(child: subprocess.Popen[bytes], grace_s: float, seen: set[Path]) -> None:
    """End the child, then whatever else it started, then remove their shared memory."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    leftovers = seen | shared_memory(descendants(os.getpid()))
    if grace_s > 0:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
    child.kill()
    child.wait()
    _kill_descendants()
    for path in leftovers:
        path.unlink(missing_ok=True)


def _kill_descendants() -> None:
    """Kill until we have no child: every orphan below us becomes one, so none can slip away."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
            time.sleep(REAP_S)


def shared_memory(pids: Iterable[int]) -> set[Path]:
    """Return the shared memory that these processes have mapped, and which therefore is theirs.

    Compared by inode, because a semaphore is mapped before it gets its lasting name.
    """
    mapped = {inode for pid in pids for inode in _mapped_inodes(pid)}
    files = (file for prefix in LEFT_BEHIND for file in SHARED_MEMORY.glob(f"{prefix}*"))
    return {file for file in files if _inode(file) in mapped}


def _mapped_inodes(pid: int) -> set[int]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {int(inode) for inode in re.findall(rf" (\d+) +{SHARED_MEMORY}/", maps)}


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def descendants(ancestor: int) -> list[int]:
    """Return every process below one; none can be missing if that one is a subreaper."""
    children: dict[int, list[int]] = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(OSError):
            _, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(parent), []).append(pid)
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
