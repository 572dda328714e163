"""The guard by itself: how it ends a command, and what it reports."""

import os
import subprocess
import sys
from pathlib import Path

from preble_sgl.runtime_ext import guard

POLITE = """
import signal, sys, time
def leave(*_):
    print("asked first", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(600)
"""


def guarded(folder: Path, grace_s: float, code: str) -> subprocess.Popen[str]:
    arguments = [str(os.getpid()), str(grace_s), str(folder), sys.executable, "-c", code]
    command = [sys.executable, "-I", "-S", guard.__file__, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Wait for `up`, close the guard's pipe, and return what else was printed and the guard's status."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdin.close()
    with process.stdout:
        return process.stdout.read(), process.wait()


def test_with_grace_the_command_is_asked_to_end(tmp_path: Path) -> None:
    assert end(guarded(tmp_path / "folder", 600, POLITE)) == ("asked first\n", 0)


def test_without_grace_it_is_killed(tmp_path: Path) -> None:
    assert end(guarded(tmp_path / "folder", 0, POLITE)) == ("", 0)


def test_the_status_of_a_command_that_ends_is_passed_on(tmp_path: Path) -> None:
    with guarded(tmp_path / "folder", 0, "raise SystemExit(3)") as process:
        assert process.wait() == 3


def test_descendants_are_found_over_generations() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (grandchild,) = guard.descendants(child.pid)
        assert {child.pid, grandchild} <= set(guard.descendants(os.getpid()))
        child.communicate("\n")
