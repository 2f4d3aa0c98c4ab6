"""Wrong variants of a right query, and a comparison of results of its own to tell which differ."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from agent.tasks.sql_text import Token, orders_rows, tokens

MAX_COPIED_ROWS = 20
"""A model sees no more of a result."""
MAX_SECONDS = 5.0
"""CPU time of one query, seconds."""
_CLAUSES = {"group", "order", "limit", "having", "union", "intersect", "except"}
_SWAPS = {
    "sum": "avg",
    "avg": "sum",
    "min": "max",
    "max": "min",
    "count": "2 * count",
    "asc": "desc",
    "desc": "asc",
}
_FRAMES = (
    ("rows", "SELECT * FROM GOLD WHERE 0"),
    ("rows", "SELECT * FROM GOLD UNION ALL SELECT * FROM GOLD"),
    ("columns", "SELECT *, 1 FROM GOLD"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """A change of a query."""

    kind: str
    """What was changed: constant, limit, where, aggregate, order, distinct, rows or columns; or
    ``copied`` for constants in place of the query."""
    query: str


def perturbations(query: str) -> Iterator[Perturbation]:
    """Yield changed queries; some may return the same rows after all.

    Examples
    --------
    >>> [p.query for p in perturbations("SELECT min(a) FROM t LIMIT 1") if p.kind != "rows"][:2]
    ['SELECT max(a) FROM t LIMIT 1', 'SELECT min(a) FROM t LIMIT 2']
    """
    query = query.strip().rstrip(";").strip()
    pieces = list(tokens(query))
    words = [piece.text.lower() if piece.kind == "word" else "" for piece in pieces]
    for index, piece in enumerate(pieces):
        word = words[index]
        if word in _SWAPS:
            kind = "order" if word in ("asc", "desc") else "aggregate"
            yield _replaced(kind, pieces, index, _SWAPS[word])
        elif word == "distinct":
            yield _replaced("distinct", pieces, index, "")
        elif word == "where":
            end = _clause_end(pieces, words, index)
            yield Perturbation(kind="where", query=_text(pieces[:index]) + _text(pieces[end:]))
        elif piece.kind == "number" and piece.text.isdigit():
            kind = "limit" if "limit" in words[max(0, index - 2) : index] else "constant"
            yield _replaced(kind, pieces, index, str(int(piece.text) + 1))
        elif piece.kind == "string" or _is_string(pieces, words, index):
            yield _replaced("constant", pieces, index, "'no such value'")
    for kind, frame in _FRAMES:
        yield Perturbation(kind=kind, query=frame.replace("GOLD", f"({query})"))


def copied(rows: Sequence[Sequence[object]]) -> Perturbation | None:
    """Return a query that holds a result as constants; None if there is nothing to copy.

    Examples
    --------
    >>> copied([(1, "it's"), (None, b"x")])
    Perturbation(kind='copied', query="VALUES (1, 'it''s'), (NULL, X'78')")
    """
    if not rows or len(rows) > MAX_COPIED_ROWS:
        return None
    lines = (f"({', '.join(map(_literal, row))})" for row in rows)
    return Perturbation(kind="copied", query=f"VALUES {', '.join(lines)}")


def _literal(value: object) -> str:
    """Write a value as SQL."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"X'{value.hex()}'"
    return (
        repr(value) if isinstance(value, int | float) else "'" + str(value).replace("'", "''") + "'"
    )


def run(connection: sqlite3.Connection, query: str) -> tuple[int, list[tuple[object, ...]]] | None:
    """Return the number of columns and the rows of a query; None if it fails or takes too long."""
    end = time.process_time() + MAX_SECONDS
    connection.set_progress_handler(lambda: int(time.process_time() > end), 10_000)
    try:
        with closing(connection.execute(query)) as cursor:
            return len(cursor.description or ()), cursor.fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None


def really_differ(
    gold: str,
    left: tuple[int, Sequence[tuple[object, ...]]],
    right: tuple[int, Sequence[tuple[object, ...]]],
) -> bool:
    """Compare two results by other means than the checker: equal after rounding, or counted.

    Examples
    --------
    >>> really_differ("SELECT a FROM t", (1, [(1,), (2,)]), (1, [(2.0,), (1,)]))
    False
    >>> really_differ("SELECT a FROM t ORDER BY a", (1, [(1,), (2,)]), (1, [(2,), (1,)]))
    True
    """
    if left[0] != right[0]:
        return True
    rows = [[tuple(map(_rounded, row)) for row in result[1]] for result in (left, right)]
    if orders_rows(gold):
        return rows[0] != rows[1]
    return Counter(rows[0]) != Counter(rows[1])


def _rounded(value: object) -> object:
    """Round a number to what the checker tells apart."""
    return round(value, 6) if isinstance(value, float) else value


def _replaced(kind: str, pieces: Sequence[Token], index: int, text: str) -> Perturbation:
    """Put a text in place of one piece."""
    query = _text(pieces[:index]) + text + _text(pieces[index + 1 :])
    return Perturbation(kind=kind, query=query)


def _clause_end(pieces: Sequence[Token], words: Sequence[str], start: int) -> int:
    """Return where the clause that begins at ``start`` ends."""
    depth = pieces[start].depth
    for index in range(start + 1, len(pieces)):
        same = pieces[index].depth == depth
        if pieces[index].depth < depth or (same and words[index] in _CLAUSES):
            return index
    return len(pieces)


def _is_string(pieces: Sequence[Token], words: Sequence[str], index: int) -> bool:
    """Tell whether a name in double quotes stands where a text is compared with."""
    if pieces[index].kind != "name":
        return False
    before = [i for i in range(index) if pieces[i].kind != "space"]
    last = before[-1] if before else 0
    return pieces[last].text in ("=", "<", ">") or words[last] == "like"


def _text(pieces: Sequence[Token]) -> str:
    """Put pieces together."""
    return "".join(piece.text for piece in pieces)
