"""The inside of the `sql` tool: a program that a bare Python runs in a sandbox session.

Its text is the session's first cell, so it imports nothing of this project. It opens a copy of
the database in memory and answers each query with one line of JSON. Numbers, texts and bytes are
passed as such; what is shown of them is decided outside.

The guards here keep a query inside its database and its memory; time limits, and everything a
bug in SQLite could lead to, are the sandbox's matter.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import re
import sqlite3
import zlib
from collections.abc import Iterator

NOW = "2025-01-01 00:00:00"
"""What 'now' is: a clock that went on would give replayed calls another result."""
MAX_STATEMENTS = 100
MAX_VALUE_BYTES = 64 * 2**20
MAX_NAME_CHARS = 100
MAX_ERROR_CHARS = 500
PRAGMAS = {
    "collation_list",
    "compile_options",
    "database_list",
    "foreign_key_check",
    "foreign_key_list",
    "function_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "module_list",
    "pragma_list",
    "quick_check",
    "table_info",
    "table_list",
    "table_xinfo",
}
"""Pragmas that only look, whatever their argument."""
READABLE = {"encoding", "foreign_keys", "page_count", "page_size", "schema_version", "user_version"}
"""Pragmas that look as long as they have no argument."""
FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "sqlite_log"}
"""Functions that reach files, native code or pointers."""
DENIED = {
    sqlite3.SQLITE_ATTACH: "ATTACH (and VACUUM)",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_CREATE_VTABLE: "CREATE VIRTUAL TABLE",
    sqlite3.SQLITE_DROP_VTABLE: "dropping a virtual table",
}


class Guard:
    """The authorizer; remembers what it refused, as SQLite's own message does not say."""

    def __init__(self) -> None:
        self.refused = ""

    def __call__(self, action: int, first: str | None, second: str | None, *rest: object) -> int:
        """Allow what stays inside the database."""
        what = DENIED.get(action, "")
        if action == sqlite3.SQLITE_PRAGMA and first is not None:
            name = first.lower()
            if name not in PRAGMAS and not (name in READABLE and second is None):
                what = f"PRAGMA {name}" + (" with a value" if name in READABLE else "")
        if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FUNCTIONS:
            what = f"the function {second}"
        if what:
            self.refused = what
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK


class Clock:
    """SQLite's date functions with a 'now' that stands still."""

    def __init__(self, built_in: sqlite3.Connection, name: str, time_at: int) -> None:
        self._built_in, self._name, self._time_at = built_in, name, time_at

    def __call__(self, *arguments: object) -> str | float | None:
        """Call the built-in function, with `NOW` in place of 'now' or of no time at all."""
        values = list(arguments)
        if len(values) == self._time_at:
            values.append(NOW)
        elif len(values) > self._time_at and str(values[self._time_at]).strip().lower() == "now":
            values[self._time_at] = NOW
        marks = ",".join("?" * len(values))
        (value,) = self._built_in.execute(f"SELECT {self._name}({marks})", values).fetchone()
        return value  # type: ignore[no-any-return]


class Database:
    """One private database in memory, behind the guards.

    Parameters
    ----------
    packed : str
        Base64 of the compressed database file; empty for an empty database.
    seed : int
        Fixes ``random()`` and ``randomblob()``.
    heap_mb : int
        Most memory SQLite may use, MiB.
    read_only : bool
        Refuse writes too.
    thinned : int, default=0
        Not 0: first delete about half of the rows of every table, another half for each number.
    """

    def __init__(
        self, packed: str, *, seed: int, heap_mb: int, read_only: bool, thinned: int = 0
    ) -> None:
        connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        if packed:
            connection.deserialize(zlib.decompress(base64.b64decode(packed)))
        connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.execute(f"PRAGMA hard_heap_limit = {heap_mb * 2**20}")
        connection.execute("PRAGMA temp_store = MEMORY")
        self._connection = connection
        if thinned:
            self._thin(random.Random(thinned))  # noqa: S311  (reproducible on purpose)
        connection.execute(f"PRAGMA query_only = {int(read_only)}")
        self._fix_random(random.Random(seed))  # noqa: S311  (reproducible on purpose)
        self._fix_clock()
        self._guard = Guard()
        connection.set_authorizer(self._guard)

    def answer(self, sql: str, *, rows: int, columns: int, chars: int, cell_chars: int) -> str:
        """Run the statements of a query until one fails; return the JSON of what they gave.

        Parameters
        ----------
        sql : str
            One or more statements.
        rows, columns : int
            Most rows and columns kept of each result; all rows are counted.
        chars : int
            Most characters of JSON for all values together.
        cell_chars : int
            Characters kept of a text or blob; of a longer one its length and hash are added.
        """
        results: list[dict[str, object]] = []
        error = None
        self._guard.refused = ""
        try:
            statements = list(split(sql))
            if len(statements) > MAX_STATEMENTS:
                raise ValueError(f"more than {MAX_STATEMENTS} statements in one call")
            for statement in statements:
                results.append(self._run(statement, rows, columns, chars, cell_chars))
                chars -= len(json.dumps(results[-1]))
        except Exception as problem:  # also of Python: text that is no text, memory
            error = self._describe(problem)
        return json.dumps({"results": results, "error": error})

    def _run(
        self, statement: str, rows: int, columns: int, chars: int, cell_chars: int
    ) -> dict[str, object]:
        """Run one statement to its end."""
        connection = self._connection
        before = connection.total_changes
        cursor = connection.execute(statement)
        kept: list[list[object]] = []
        count = 0
        for row in cursor:
            count += 1
            if count == len(kept) + 1 <= rows and chars > 0:
                kept.append([cell(value, cell_chars) for value in row[:columns]])
                chars -= len(json.dumps(kept[-1]))
        changed = None
        if connection.total_changes != before:
            (changed,) = connection.execute("SELECT changes()").fetchone()
        elif cursor.rowcount >= 0 and cursor.description is None:
            changed = 0
        names = [str(item[0])[:MAX_NAME_CHARS] for item in cursor.description or ()]
        if chars < 0 and kept:
            kept.pop()
        return {
            "columns": names[:columns] if cursor.description else None,
            "num_columns": len(names),
            "rows": kept,
            "num_rows": count,
            "changed": changed,
        }

    def _describe(self, problem: Exception) -> str:
        """Say what went wrong, in SQLite's words where it has any."""
        if self._guard.refused:
            return f"not allowed here: {self._guard.refused}"
        if isinstance(problem, MemoryError):
            return "out of memory"
        if isinstance(problem, UnicodeError):
            return "the query holds characters that are no valid text"
        return str(problem)[:MAX_ERROR_CHARS] or type(problem).__name__

    def _thin(self, dice: random.Random) -> None:
        """Delete rows by tossing a coin."""
        self._connection.create_function("toss", 0, lambda: dice.getrandbits(1))
        tables = self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (name,) in tables.fetchall():
            quoted = '"' + name.replace('"', '""') + '"'
            with contextlib.suppress(sqlite3.Error):  # SQLite's own tables
                self._connection.execute(f"DELETE FROM {quoted} WHERE toss()")  # noqa: S608
        self._connection.create_function("toss", 0, None)

    def _fix_random(self, dice: random.Random) -> None:
        """Make SQLite's random functions follow the seed."""
        self._connection.create_function("random", 0, lambda: dice.getrandbits(64) - 2**63)
        self._connection.create_function(
            "randomblob", 1, lambda size: dice.randbytes(min(max(int(size), 1), MAX_VALUE_BYTES))
        )

    def _fix_clock(self) -> None:
        """Make SQLite's date functions read a clock that stands still."""
        built_in = sqlite3.connect(":memory:")
        for name in ("date", "time", "datetime", "julianday", "unixepoch", "strftime"):
            clock = Clock(built_in, name, int(name == "strftime"))
            self._connection.create_function(name, -1, clock, deterministic=True)
        for name, built in (("date", "date"), ("time", "time"), ("timestamp", "datetime")):
            clock = Clock(built_in, built, 0)
            self._connection.create_function(f"current_{name}", 0, clock, deterministic=True)


def split(sql: str) -> Iterator[str]:
    """Yield the statements of a text; strings, comments and triggers may hold semicolons."""
    pending = ""
    for piece in re.split("(?<=;)", sql):
        pending += piece
        if piece.endswith(";") and sqlite3.complete_statement(pending):
            if pending.strip(" \t\r\n;"):
                yield pending
            pending = ""
    if pending.strip():
        yield pending


def cell(value: object, most: int) -> object:
    """Write a value as JSON: null, a number, a text, or an object for what JSON has no word for."""
    if isinstance(value, bytes):
        if len(value) <= most:
            return {"blob": value.hex()}
        return {"blob": value[:most].hex(), "length": len(value), "hash": digest(value)}
    if isinstance(value, str) and len(value) > most:
        return {"text": value[:most], "length": len(value), "hash": digest(value.encode())}
    return value


def digest(data: bytes) -> str:
    """Return what tells long values apart."""
    return hashlib.sha256(data).hexdigest()
