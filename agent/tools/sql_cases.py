"""One hostile or odd query against a small database: for checks of a sandbox backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from agent.sandbox.base import Limits, Sandbox
from agent.tools.sql import SqlTool
from agent.tools.sql_database import database_from_script, pack

ITEMS = """
CREATE TABLE items(id INTEGER, name TEXT);
INSERT INTO items VALUES (1, 'apple'), (2, 'pear'), (3, 'plum');
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SqlCase:
    """What became of a query."""

    ended: Literal["ok", "error", "timeout", "killed"]
    """How it ended: ``error`` is one the model reads with the state kept, ``killed`` stands for
    a process that died or was stopped for its output."""
    text: str
    """What the model would read."""
    goes_on: bool
    """Whether the next query of the same session found the table as usual."""


async def run_sql_case(sandbox: Sandbox, limits: Limits, code: str) -> SqlCase:
    """Run SQL on a fresh database with the table ``items(id, name)`` of three rows.

    Parameters
    ----------
    sandbox : Sandbox
        Backend under test.
    limits : Limits
        Bounds of every query.
    code : str
        One or more statements.

    Raises
    ------
    ToolFailure
        If the sandbox broke.
    """
    session = await SqlTool(sandbox, limits=limits).open_packed(_items(), 0)
    try:
        observation = await session.call({"query": code})
        after = await session.call({"query": "SELECT name FROM items WHERE id = 2"})
    finally:
        await session.close()
    return SqlCase(
        ended=_ended(observation.error),
        text=observation.content,
        goes_on=after.error is None and "pear" in after.content,
    )


def _ended(error: str | None) -> Literal["ok", "error", "timeout", "killed"]:
    """Translate the error class of an observation."""
    if error is None:
        return "ok"
    if error == "timeout":
        return "timeout"
    return "killed" if error in ("crash", "output_limit") else "error"


@cache
def _items() -> str:
    """Return the database, packed."""
    return pack(database_from_script(ITEMS))
