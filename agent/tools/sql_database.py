"""Database files for the `sql` tool: found, checked, and packed to travel as text."""

from __future__ import annotations

import base64
import sqlite3
import zlib
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from trajectory.errors import InputError
from trajectory.records import Task

MAX_DATABASE_MB = 32
"""Largest file, MiB: every session holds a copy in memory."""
_MAGIC = b"SQLite format 3\0"
_JOURNAL_MODE = slice(18, 20)
"""Two header bytes, 2 in write-ahead mode, which a database in memory cannot be in."""


def database_path(task: Task) -> Path:
    """Return the database file of a task.

    Raises
    ------
    InputError
        If the task names none.
    """
    path = task.meta.get("database")
    if not isinstance(path, str) or not path:
        raise InputError(
            f"task {task.task_id!r} of the domain {task.domain!r} has no database, which the tool "
            "'sql' needs: use it with --tasks sql:FILE.jsonl"
        )
    return Path(path)


def check_database(task: Task) -> None:
    """Make sure that a task's database can be opened.

    Raises
    ------
    InputError
        If the task names none, or as `read_database`.
    """
    packed_database(database_path(task))


def read_database(path: Path) -> bytes:
    """Return the bytes of a database file, ready to be opened in memory.

    Raises
    ------
    InputError
        If it cannot be read, is no SQLite database, is too large, or has changes that are not
        in the file yet.
    """
    try:
        data = path.read_bytes()
        log = path.with_name(path.name + "-wal")
        has_log = log.exists() and log.stat().st_size > 0
    except OSError as error:
        raise InputError(f"cannot read the database {path}: {error.strerror}") from error
    if not data.startswith(_MAGIC):
        raise InputError(f"{path} is no SQLite database: its first bytes are not 'SQLite format 3'")
    if len(data) > MAX_DATABASE_MB * 2**20:
        raise InputError(
            f"the database {path} has {len(data) >> 20} MiB, the limit is {MAX_DATABASE_MB}: every "
            "session holds a copy in memory; use a smaller one"
        )
    if has_log:
        raise InputError(
            f"the database {path} has changes beside it in {log.name}: bring them in with "
            f"sqlite3 {path.name} 'PRAGMA wal_checkpoint(TRUNCATE)'"
        )
    if data[_JOURNAL_MODE] == b"\2\2":
        data = data[: _JOURNAL_MODE.start] + b"\1\1" + data[_JOURNAL_MODE.stop :]
    return data


def pack(data: bytes) -> str:
    """Compress the bytes of a database into ASCII text; no bytes give no text."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii") if data else ""


def packed_database(path: Path) -> str:
    """Return a database file packed; a file that did not change is read once.

    Raises
    ------
    InputError
        As `read_database`.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"cannot read the database {path}: {error.strerror}") from error
    return _packed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _packed(path: Path, changed_ns: int, size: int) -> str:
    """Read and pack a file in the state that the other arguments tell."""
    return pack(read_database(path))


def database_from_script(script: str) -> bytes:
    """Make a database from SQL that the caller trusts.

    Examples
    --------
    >>> data = database_from_script("CREATE TABLE t(a); INSERT INTO t VALUES (7);")
    >>> data[:15]
    b'SQLite format 3'
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        return connection.serialize()
