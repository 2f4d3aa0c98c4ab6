"""Replace a file or folder as a whole: readers see the old one or the new one, never a mixture.

The new content is written to a temporary neighbour ``.NAME.HOST-PID.tmp``, flushed to disk and
renamed over the old. A failure (full disk, exception, Ctrl-C) removes the neighbour; one left by
a killed process is removed by the next writer of the same name on the same machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trajectory.errors import InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to; on success it replaces ``path``.

    Parameters
    ----------
    path : str or Path
        The file to create or replace; its folder is created.

    Yields
    ------
    Path
        A temporary neighbour with the same suffix. If the block raises, it is removed and the
        old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path, path.suffix)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it replaces the folder ``path``.

    Parameters
    ----------
    path : str or Path
        The folder to create or replace.

    Yields
    ------
    Path
        A temporary neighbour. If the block raises, it is removed and the old folder stays.

    Raises
    ------
    InputError
        If ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: give a folder for the output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path, "")
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        _swap_in(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)


def _neighbour(path: Path, suffix: str) -> Path:
    """Name a temporary neighbour, after removing those of dead processes of this machine."""
    host = socket.gethostname() or "localhost"
    for old in path.parent.glob(f".{_escape(path.name)}.{_escape(host)}-*.tmp*"):
        pid = old.name[len(f".{path.name}.{host}-") :].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    token = uuid.uuid4().hex[:8]
    return path.parent / f".{path.name}.{host}-{os.getpid()}-{token}.tmp{suffix}"


def _escape(name: str) -> str:
    """Quote the characters that ``glob`` would interpret."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap_in(new: Path, path: Path) -> None:
    """Put the folder ``new`` at ``path``; the old folder, if any, is removed."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange(new, path):
        shutil.rmtree(new)
        return
    # File systems without atomic exchange: a moment without `path`, never without the old folder.
    old = new.with_name(new.name + "-old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step (Linux ``renameat2``); False where that is not supported."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)


def _fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
