"""math-verify with limits that hold in any thread and against any answer.

Its own time-outs use Python signal handlers, which work only in the main thread and do not
interrupt C code (``9**9**9**9`` hangs). Here it runs in one persistent child that is killed at
the limit.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from agent.processes import CHILD_ENVIRONMENT, end_group

PROGRAM = Path(__file__).with_name("equivalence.py")
START_SECONDS = 120.0
"""Importing sympy takes half a second; a loaded machine may take long."""
ATTEMPTS = 2
"""A child that something else killed is replaced once, and the comparison repeated."""


class Verifier:
    """Compares expressions; may be called from any thread, one comparison at a time.

    Parameters
    ----------
    cpu_s : float, default=2.0
        CPU time of one comparison, seconds; a usual one takes 0.01.
    wall_s : float, default=60.0
        Wall-clock backstop, seconds.
    """

    def __init__(self, *, cpu_s: float = 2.0, wall_s: float = 60.0) -> None:
        self._cpu_s, self._wall_s = cpu_s, wall_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] | None = None

    def equivalent(self, gold: str, answer: str) -> bool:
        """Tell whether two expressions mean the same; False where the limits do not suffice.

        Raises
        ------
        RuntimeError
            If math-verify cannot be started.
        """
        request = json.dumps([gold, answer]).encode() + b"\n"
        with self._lock:
            for _ in range(ATTEMPTS):
                process = self._process or self._start()
                reply = _ask(process, request, self._wall_s)
                if reply is not None:
                    return reply == b"true\n"
                self._stop()
                if process.returncode == -signal.SIGPROF:
                    break
        return False

    def close(self) -> None:
        """End the child; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the child and wait until it has imported math-verify."""
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(  # noqa: S603  (our own program, no shell)
                [sys.executable, "-s", "-P", str(PROGRAM), str(self._cpu_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(CHILD_ENVIRONMENT),
                start_new_session=True,
                bufsize=0,
            )
            self._process = process
            self._end = weakref.finalize(self, _end, process)
            if _read_line(process, START_SECONDS) == b"ready\n":
                return process
            self._stop()
            log.seek(0)
            reason = log.read()[-500:].decode(errors="replace").strip() or "no reply"
        raise RuntimeError(f"the math-verify process did not start: {reason}")

    def _stop(self) -> None:
        """End the child, if any."""
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _ask(process: subprocess.Popen[bytes], request: bytes, wall_s: float) -> bytes | None:
    """Send a request and return the reply, or None if the child died or took too long."""
    assert process.stdin is not None
    try:
        process.stdin.write(request)
    except OSError:
        return None
    return _read_line(process, wall_s)


def _read_line(process: subprocess.Popen[bytes], wall_s: float) -> bytes | None:
    """Read one line, or None if the child died or took too long."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + wall_s
    while not line.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        if not select.select([process.stdout], [], [], left)[0]:
            return None
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            process.wait()
            return None
        line += chunk
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and close its pipes."""
    end_group(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
