"""Helpers for the child processes that tools and checkers run."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

CHILD_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MPLBACKEND": "Agg",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""The whole environment of a child: nothing is inherited, so no secret is either."""


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time a live process has used, or None where it cannot be read.

    Notes
    -----
    Reads the process's CPU clock, whose id Linux defines as ``(~pid << 3) | 2``; no cooperation
    of the process is needed, so code that blocks signals cannot hide its use.

    Examples
    --------
    >>> cpu_seconds(2**22 + 1) is None
    True
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether the process is dead, leaving it unreaped so that its group id stays taken."""
    if process.returncode is not None:
        return True
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, process.pid, flags) is not None
    except ChildProcessError:  # the caller ignores SIGCHLD, so the kernel has reaped it
        return True


def end_group(process: subprocess.Popen[bytes]) -> int:
    """Kill the process group the process leads and return its exit code (``-signal`` if killed).

    Notes
    -----
    A process that left the group (``setsid``) is not reached.
    """
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            process.kill()
    return process.wait()


def descendants(pid: int) -> list[int]:
    """Return the processes below one, in no particular order (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], list(children.get(pid, []))
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def end_descendants() -> None:
    """Kill every process below this one, whoever started it, and wait until all are gone.

    Notes
    -----
    A process that is born while the others are counted is found in the next round, so this ends
    only when the kernel says that there is no child. A caller that is a subreaper
    (``PR_SET_CHILD_SUBREAPER``) reaches the orphans among them too.
    """
    with suppress(ChildProcessError):
        while True:
            for pid in descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.002)
