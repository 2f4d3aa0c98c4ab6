"""The `sql` tool: SQLite on a private copy of the task's database.

Reads and writes are allowed and last over the episode; what would leave the database (other
files, native code, settings) is refused by `agent.tools.sql_program`, and what takes too long or
too much memory is ended by the sandbox, with the database as it was before the call.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.sandbox.base import Limits, Sandbox
from agent.tools.arguments import text_argument, text_schema, unfenced
from agent.tools.base import SideEffect
from agent.tools.sql_box import Caps, Reply, SqlBox, check_sandbox
from agent.tools.sql_database import database_path, packed_database
from agent.tools.sql_table import results_text
from trajectory.records import JsonValue, Observation, Task

MAX_QUERY_CHARS = 20_000
"""Longest query."""
SHOWN = Caps(rows=20, columns=30, chars=40_000, cell_chars=100)
"""What a model gets to see of a result, before `sql_table.MAX_CHARS`."""


class SqlSession:
    """A database that speaks in observations."""

    def __init__(self, box: SqlBox, limits: Limits) -> None:
        self._box, self._limits = box, limits

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Run ``query``, one or more statements.

        Error classes: ``bad_arguments``; ``sql_error``, what SQLite or a guard refused, after
        which the statements before it stand; ``timeout``, ``crash`` and ``output_limit``, after
        which the database is as before.

        Raises
        ------
        ToolFailure
            If the sandbox broke.
        """
        query = text_argument(arguments, "query")
        if isinstance(query, Observation):
            return query
        if len(query) > MAX_QUERY_CHARS:
            text = f"Error: the query has {len(query)} characters, the limit is {MAX_QUERY_CHARS}."
            return Observation(content=text, error="sql_error")
        reply = await self._box.query(unfenced(query), SHOWN)
        error = "sql_error" if reply.status == "error" else reply.status
        return Observation(
            content=observation_text(reply, self._limits),
            error=None if reply.status == "ok" else error,
            seconds=reply.wall_s,
        )

    async def branch(self) -> SqlSession:
        """Copy the present state into a session that shares nothing with this one."""
        return SqlSession(await self._box.branch(), self._limits)

    async def close(self) -> None:
        """End the sandbox session."""
        await self._box.close()


class SqlTool:
    """Runs SQL in a sandbox.

    Parameters
    ----------
    sandbox : Sandbox
        Where SQLite runs.
    limits : Limits, optional
        Bounds of every call.

    Raises
    ------
    InputError
        If the sandbox cannot run SQLite.
    """

    def __init__(self, sandbox: Sandbox, *, limits: Limits | None = None) -> None:
        check_sandbox(sandbox)
        self.name = "sql"
        self.description = (
            "Run SQL statements (SQLite dialect) on a private copy of the database: changes last "
            "until the end of the conversation. Returns the rows as a table."
        )
        self.parameters: Mapping[str, JsonValue] = text_schema(
            "query", "The SQL, for example SELECT name FROM singer LIMIT 5."
        )
        self.effect = SideEffect.STATEFUL
        self.isolation = sandbox.isolation
        self._sandbox = sandbox
        self._limits = limits or Limits()

    async def open(self, task: Task, seed: int) -> SqlSession:
        """Begin with a fresh copy of the task's database; ``seed`` fixes ``random()``.

        Raises
        ------
        InputError
            If the task has no database, or its file cannot be used.
        ToolFailure
            If the sandbox broke.
        """
        packed = packed_database(database_path(task))
        return await self.open_packed(packed, seed)

    async def open_packed(self, packed: str, seed: int) -> SqlSession:
        """Begin with a database from `agent.tools.sql_database.pack`."""
        box = await SqlBox.open(self._sandbox, self._limits, packed, seed=seed)
        return SqlSession(box, self._limits)


def observation_text(reply: Reply, limits: Limits) -> str:
    """Write a reply as the model reads it: the results, then what went wrong.

    Examples
    --------
    >>> print(observation_text(Reply(status="timeout", cpu_s=5.0), Limits()))
    [timed out: 5 s of CPU time. The database is as before this call.]
    """
    over_wall = reply.wall_s >= limits.wall_s  # the clock of the CPU may stop just below its limit
    limit = f"{limits.wall_s:g} s" if over_wall else f"{limits.cpu_s:g} s of CPU time"
    notes = {
        "timeout": f"timed out: {limit}",
        "crash": "the database process died",
        "output_limit": "stopped: too much output",
    }
    if reply.status in notes:
        return f"[{notes[reply.status]}. The database is as before this call.]"
    parts = [results_text(reply.results)] if reply.results else []
    if reply.status == "error":
        number = len(reply.results) + 1
        where = f" in statement {number} (those before it took effect)" if number > 1 else ""
        parts.append(f"Error{where}: {reply.message}")
    return "\n\n".join(parts) or "(no statement)"
