"""The zygote as seen from outside: starting it, asking it for boxes, ending it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from agent.processes import CHILD_ENVIRONMENT
from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.forkjail.frames import Frame, Reader, send
from agent.sandbox.forkjail.namespaces import SCRATCH

START_S = 120.0
"""Importing numpy and sympy takes half a second; a loaded machine may take long."""
END_S = 30.0
MAX_STATES = 64
"""Snapshots of one box; further ones push out the longest unused."""
SANDBOX_UID = 60123
"""Whom root becomes inside: a number that no user or service of a distribution has."""
PRELOAD = ("numpy", "numpy.random", "sympy", "random", "fractions", "decimal", "statistics",
           "collections", "itertools", "functools", "datetime", "re", "json", "sqlite3", "hashlib",
           "zlib", "base64")  # fmt: skip
"""Imported once for all cells, where installed."""
_SYSTEM_PATHS = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
)  # fmt: skip


def visible_paths() -> tuple[str, ...]:
    """Return what cells can read: the standard library, installed packages, shared libraries."""
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {f"{sys.base_prefix}/lib", *_SYSTEM_PATHS}
    kept: list[str] = []
    for path in sorted(folders):
        inside = any(path.startswith(f"{other}/") and not os.path.islink(other) for other in kept)
        if os.path.lexists(path) and not inside:
            kept.append(path)
    return tuple(kept)


class Zygote:
    """A zygote process, started at the first use and again after its death.

    Parameters
    ----------
    own_namespaces : bool
        Tier A or B.
    preload : tuple of str, optional
        Modules imported for all cells.
    """

    def __init__(self, *, own_namespaces: bool, preload: tuple[str, ...] = PRELOAD) -> None:
        self._own_namespaces, self._preload = own_namespaces, preload
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: IO[bytes] | None = None

    @property
    def up(self) -> bool:
        """Whether it runs, so that a box is made without waiting for it to start."""
        return self._control is not None and not self._lock.locked()

    @property
    def pid(self) -> int | None:
        """The live process, None before the first use."""
        return None if self._process is None else self._process.pid

    def new_box(self, limits: Limits, seed: int) -> socket.socket:
        """Return our end of a new box's socket; blocks while a zygote has to be started.

        Raises
        ------
        SandboxError
            If none can be started.
        """
        order: Frame = {
            "t": "box",
            "fds": 1,
            "seed": seed,
            "memory_mb": limits.memory_mb,
            "cpu_s": limits.cpu_s,
            "cpu_limit_s": math.ceil(limits.cpu_s),
            "file_mb": limits.file_mb,
            "scratch_mb": limits.scratch_mb,
            "threads": limits.threads,
            "max_states": MAX_STATES,
        }
        with self._lock:
            for attempt in range(2):
                control = self._control or self._start()
                ours, theirs = socket.socketpair()
                with theirs:
                    try:
                        send(control, order, [theirs.fileno()])
                        return ours
                    except OSError as error:
                        ours.close()
                        self._stop()
                        if attempt:
                            raise SandboxError(f"the zygote does not answer: {error}") from error
        raise AssertionError("unreachable")

    def last_words(self) -> str:
        """Return the last line that zygote or boxes complained with; empty if none."""
        log = self._log
        if log is None:
            return ""
        words = os.pread(log.fileno(), 1 << 20, max(0, os.fstat(log.fileno()).st_size - 2000))
        lines = words.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End the zygote and every box, and wait until all are gone; may be called twice."""
        with self._lock:
            self._stop()

    def _start(self) -> socket.socket:
        """Start the process and wait until it is ready."""
        installed = tuple(m for m in self._preload if _can_import(m))
        config = {
            "own_namespaces": self._own_namespaces,
            "read_only": list(visible_paths()),
            "preload": list(installed),
            "sandbox_uid": SANDBOX_UID,
        }
        root = Path(__file__).resolve().parents[3]
        environment = {
            **CHILD_ENVIRONMENT,
            "PYTHONPATH": str(root),
            "HOME": SCRATCH,
            "PYTHONWARNINGS": "ignore",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in _stop)
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  (our own program, no shell)
                    [sys.executable, "-s", "-P", "-m", "agent.sandbox.forkjail.zygote",
                     str(theirs.fileno()), json.dumps(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    env=environment,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"cannot start the zygote: {error}") from error
        self._control = ours
        why = self._await_ready(ours)
        if why is not None:
            self._stop()
            raise SandboxError(f"the zygote did not start: {why}")
        ours.settimeout(None)
        return ours

    def _await_ready(self, control: socket.socket) -> str | None:
        """Return None once the zygote is ready, else why it is not."""
        reader = Reader()
        control.settimeout(START_S)
        try:
            alive = True
            while alive:
                alive = reader.receive(control)
                for frame, _ in reader.frames():
                    return None if frame["t"] == "ready" else str(frame.get("why"))
        except TimeoutError:
            return f"no sign of life in {START_S:g} s"
        return self.last_words() or "it died without a word"

    def _stop(self) -> None:
        """End the process: it ends its boxes when its socket closes, and goes."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            if self._process.returncode is None:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def _can_import(name: str) -> bool:
    """Tell whether a module is installed, without importing it."""
    import importlib.util

    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
