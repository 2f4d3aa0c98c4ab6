"""SQL as text: its tokens, whether it orders rows, the query in an answer, a schema's outline."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<string>'(?:[^']|'')*')
    |(?P<name>"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\])
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<word>\w+)
    |(?P<mark>.)""",
    re.DOTALL | re.VERBOSE,
)
_FENCE = re.compile(r"```[ \t]*(\w*)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ANSWER = re.compile(r"\banswer\b[^\n:]{0,40}:", re.IGNORECASE)
_INLINE = re.compile(r"`([^`]+)`\.?")
_QUERY = re.compile(r"\s*(?:select|with|values)\b", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")

Kind = Literal["space", "string", "name", "number", "word", "mark"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A piece of SQL; the pieces together are the whole text."""

    text: str
    kind: Kind
    """``name`` is a quoted identifier, ``word`` a keyword or plain identifier."""
    depth: int
    """Parentheses around it."""


def tokens(sql: str) -> Iterator[Token]:
    """Yield the pieces of a text, comments and spaces included.

    Examples
    --------
    >>> [token.text for token in tokens("count(*)") if token.depth == 1]
    ['*']
    """
    depth = 0
    for match in _TOKEN.finditer(sql):
        text, kind = match[0], match.lastgroup
        depth -= text == ")"
        yield Token(text=text, kind=kind, depth=depth)  # type: ignore[arg-type]
        depth += text == "("


def orders_rows(sql: str) -> bool:
    """Tell whether a query has an ORDER BY of its own, not only in a subquery or a window.

    Examples
    --------
    >>> orders_rows("SELECT a FROM t ORDER BY a"), orders_rows("VALUES ((SELECT 1 ORDER BY 1))")
    (True, False)
    """
    words = [t.text.lower() if t.depth == 0 else "" for t in tokens(sql) if t.kind != "space"]
    return ("order", "by") in pairwise(words)


def query_in(text: str) -> str | None:
    r"""Return the query that a turn gives as its answer.

    The last block fenced as ``sql`` (or without a language) counts, else what follows the last
    "Answer:", else the whole text if it begins with SELECT, WITH or VALUES.

    Examples
    --------
    >>> query_in("There are six.\nAnswer: `SELECT 6`")
    'SELECT 6'
    """
    fenced = [(match[1].lower(), match[2].strip()) for match in _FENCE.finditer(text)]
    for languages in (("sql", "sqlite"), ("",)):
        found = [body for language, body in fenced if language in languages and body]
        if found:
            return found[-1]
    after = [text[match.end() :] for match in _ANSWER.finditer(text)]
    if after:
        answer = after[-1].strip().removeprefix("**").strip()
        inline = _INLINE.fullmatch(answer)
        return (inline[1].strip() if inline else answer) or None
    return text.strip() if _QUERY.match(text) else None


def schema_outline(database: bytes) -> str:
    """Write the tables and views of a database as short CREATE statements.

    Raises
    ------
    sqlite3.Error
        If the bytes are no readable database.
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(database)
        connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
        found = connection.execute(
            "SELECT type, name, sql FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid"
        ).fetchall()
        return "\n".join(
            _table(connection, name) if kind == "table" else " ".join(sql.split()) + ";"
            for kind, name, sql in found
        )


def _table(connection: sqlite3.Connection, table: str) -> str:
    """Write one table: columns with types, keys."""
    columns = connection.execute("SELECT * FROM pragma_table_info(?)", (table,)).fetchall()
    parts = [f"{_name(name)} {kind}".rstrip() for _, name, kind, *_ in columns]
    keys = sorted((key, name) for _, name, _, _, _, key in columns if key)
    if keys:
        parts.append(f"PRIMARY KEY ({_names([name for _, name in keys])})")
    references: dict[int, list[tuple[str, str, str | None]]] = {}
    for number, _, other, own, theirs, *_ in connection.execute(
        "SELECT * FROM pragma_foreign_key_list(?) ORDER BY id, seq", (table,)
    ):
        references.setdefault(number, []).append((other, own, theirs))
    for pairs in references.values():
        ours = _names([own for _, own, _ in pairs])
        theirs = [column for _, _, column in pairs if column is not None]
        target = f"{_name(pairs[0][0])}({_names(theirs)})" if theirs else _name(pairs[0][0])
        parts.append(f"FOREIGN KEY ({ours}) REFERENCES {target}")
    return f"CREATE TABLE {_name(table)} ({', '.join(parts)});"


def _names(names: Sequence[str]) -> str:
    """Write a list of columns."""
    return ", ".join(map(_name, names))


def _name(name: str) -> str:
    """Quote an identifier if it needs it."""
    return name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'
