"""Scratch folders of processes that may be killed: what one leaves behind, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_LOCK = ".lock"
_YOUNG_S = 60.0
"""A folder without a lock may be one that is being made, if it is not older than this, seconds."""


class Scratch:
    """A folder for the life of this process.

    The kernel gives a dead process's lock back, so a folder whose lock is free belongs to nobody.

    Parameters
    ----------
    prefix : str
        Beginning of the folder's name; folders of dead processes with it are removed first.
    """

    def __init__(self, prefix: str) -> None:
        _sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock: int | None = _try_lock(self.path)

    def close(self) -> None:
        """Remove the folder; may be called twice."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _try_lock(folder: Path) -> int | None:
    """Take a folder's lock and return the descriptor that holds it; None if another has it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _sweep(prefix: str) -> None:
    """Remove the folders of dead processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # another user's, or another process is sweeping too
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            lock = _try_lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
