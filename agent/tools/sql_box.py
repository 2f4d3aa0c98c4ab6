"""A database in a sandbox session: opened from packed bytes, queried, branched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.sandbox.base import Limits, Result, Sandbox, SandboxError, Session, Status
from agent.tools.base import ToolFailure
from trajectory.errors import InputError
from trajectory.records import JsonValue

PROGRAM = Path(__file__).with_name("sql_program.py").read_text(encoding="utf-8")
MAX_HEAP_MB = 256
"""Memory SQLite may use, MiB; half of the sandbox's limit where that is less."""
OUTPUT_CHARS = 8_000_000
"""Longest reply; `Caps` keep it far shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """How much of a reply leaves the sandbox."""

    rows: int
    """Most rows of each result; all are counted."""
    columns: int
    """Most columns."""
    chars: int
    """Most characters of JSON for all values together, up to half of `OUTPUT_CHARS`."""
    cell_chars: int
    """Characters of a text, or bytes of a blob; of a longer one length and hash are added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatementResult:
    """What one statement gave."""

    columns: tuple[str, ...] | None
    """Names of the kept columns; None for a statement that returns no rows."""
    num_columns: int
    rows: tuple[tuple[JsonValue, ...], ...]
    """The kept rows. A blob, and a text that was cut, is an object: its beginning under ``blob``
    (hex) or ``text``, and if it was cut its ``length`` and ``hash``."""
    num_rows: int
    """All rows."""
    changed: int | None
    """Rows inserted, updated or deleted; None for a statement that does none of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a query gave."""

    status: Status
    """``error`` for what SQLite refused; a limit means that nothing of the query took effect."""
    results: tuple[StatementResult, ...] = ()
    """Of the statements before the one that failed."""
    message: str = ""
    """What is wrong with the query."""
    cpu_s: float = 0.0
    wall_s: float = 0.0


def check_sandbox(sandbox: Sandbox) -> None:
    """Refuse a sandbox that cannot run SQLite.

    Raises
    ------
    InputError
        If it is not CPython that it runs.
    """
    if not sandbox.capabilities.cpython:
        raise InputError(
            f"SQL runs in a sandbox with the whole of Python, which {sandbox.name!r} is not: "
            "choose --sandbox auto"
        )


class SqlBox:
    """A private copy of a database, inside a sandbox session; made by `open`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    async def open(
        cls,
        sandbox: Sandbox,
        limits: Limits,
        packed: str,
        *,
        seed: int,
        read_only: bool = False,
        thinned: int = 0,
    ) -> SqlBox:
        """Open a copy of a database.

        Parameters
        ----------
        sandbox : Sandbox
            Where the queries run.
        limits : Limits
            Bounds of every query; its ``output_chars`` is not used.
        packed : str
            From `agent.tools.sql_database.pack`.
        seed : int
            Fixes ``random()``.
        read_only : bool, default=False
            Refuse writes.
        thinned : int, default=0
            Not 0: delete about half of the rows first, another half for each number.

        Raises
        ------
        ToolFailure
            If the sandbox broke or cannot hold the database.
        InputError
            As `check_sandbox`.
        """
        check_sandbox(sandbox)
        heap_mb = max(1, min(MAX_HEAP_MB, limits.memory_mb // 2))
        settings = f"seed={seed}, heap_mb={heap_mb}, read_only={read_only}, thinned={thinned}"
        code = f"{PROGRAM}\ndatabase = Database({packed!r}, {settings})\n"
        try:
            session = await sandbox.open(replace(limits, output_chars=OUTPUT_CHARS), seed)
        except SandboxError as error:
            raise ToolFailure(f"the sql sandbox broke: {error}") from error
        box = cls(session)
        try:
            result = await box._run(code)
            if result.status != "ok":
                raise ToolFailure(f"the database could not be opened: {_cause(result)}")
        except BaseException:
            await session.close()
            raise
        return box

    async def query(self, sql: str, caps: Caps) -> Reply:
        """Run the statements of a query, up to the first that fails.

        Raises
        ------
        ToolFailure
            If the sandbox broke.
        """
        sizes = f"rows={caps.rows}, columns={caps.columns}, chars={caps.chars}"
        result = await self._run(
            f"print(database.answer({sql!a}, {sizes}, cell_chars={caps.cell_chars}))"
        )
        if result.status == "ok":
            return _read(result)
        if result.error == "MemoryError":
            return _reply(result, message="out of memory")
        if result.status == "error":
            raise ToolFailure(f"the sql program broke: {_cause(result)}")
        return _reply(result)

    async def branch(self) -> SqlBox:
        """Copy the present state into a box that shares nothing with this one.

        Raises
        ------
        ToolFailure
            If the sandbox broke.
        """
        try:
            return SqlBox(await self._session.branch())
        except SandboxError as error:
            raise ToolFailure(f"the sql sandbox broke: {error}") from error

    async def close(self) -> None:
        """End the session; may be called twice."""
        await self._session.close()

    async def _run(self, code: str) -> Result:
        """Run a cell."""
        try:
            return await self._session.run(code)
        except SandboxError as error:
            raise ToolFailure(f"the sql sandbox broke: {error}") from error


def _read(result: Result) -> Reply:
    """Read the program's line."""
    try:
        line: Mapping[str, Any] = json.loads(result.stdout)
        results = tuple(_result(item) for item in line["results"])
        message = line["error"] or ""
    except (ValueError, KeyError, TypeError) as error:
        raise ToolFailure(f"the sql program sent no reply: {result.stdout[:200]!r}") from error
    status: Status = "error" if message else "ok"
    return replace(_reply(result, message=message), status=status, results=results)


def _reply(result: Result, *, message: str = "") -> Reply:
    """Return a reply without results."""
    return Reply(status=result.status, message=message, cpu_s=result.cpu_s, wall_s=result.wall_s)


def _result(item: Mapping[str, Any]) -> StatementResult:
    """Read the result of one statement."""
    columns = item["columns"]
    return StatementResult(
        columns=None if columns is None else tuple(columns),
        num_columns=item["num_columns"],
        rows=tuple(tuple(row) for row in item["rows"]),
        num_rows=item["num_rows"],
        changed=item["changed"],
    )


def _cause(result: Result) -> str:
    """Say in a few words how a run ended that should not have."""
    last = result.stderr.strip().splitlines()[-1:]
    return ": ".join([result.status, *last])[:300]
