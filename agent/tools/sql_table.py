"""Results of SQL statements as the plain text a model reads."""

from __future__ import annotations

from collections.abc import Sequence

from agent.sandbox.output import Capture, show_controls
from agent.tools.sql_box import StatementResult
from trajectory.records import JsonValue

MAX_CHARS = 2000
"""Longest text of all results together."""
_FRAME_LINES = 3
"""Header, rule and footer."""


def results_text(results: Sequence[StatementResult]) -> str:
    r"""Write results one below the other, with fewer rows where they would be too long.

    Examples
    --------
    >>> print(
    ...     results_text(
    ...         [
    ...             StatementResult(
    ...                 columns=("id", "name"),
    ...                 num_columns=2,
    ...                 rows=((1, "Ann"), (20, None)),
    ...                 num_rows=5,
    ...                 changed=None,
    ...             )
    ...         ]
    ...     )
    ... )
    id | name
    ---+-----
    1  | Ann
    20 | NULL
    (5 rows, 3 of them not shown)
    """
    texts: list[str] = []
    room = MAX_CHARS
    for result in results:
        texts.append(_result_text(result, room))
        room = max(0, room - len(texts[-1]))
    capture = Capture(MAX_CHARS)
    capture.feed("\n\n".join(texts).encode())
    return capture.text()


def cell_text(value: JsonValue) -> str:
    r"""Write one value on one line.

    Examples
    --------
    >>> [cell_text(value) for value in (None, 3, 2.0, 0.1 + 0.2, "a\nb", {"blob": "00ff"})]
    ['NULL', '3', '2.0', '0.3', 'a\\nb', "X'00ff'"]
    """
    if value is None:
        return "NULL"
    if isinstance(value, float):
        text = f"{value:.15g}"
        return f"{text}.0" if text.lstrip("-").isdigit() else text
    if isinstance(value, dict):
        if "blob" in value:
            unit, text = "bytes", f"X'{value['blob']}'"
        else:
            unit, text = "characters", _line(str(value["text"]))
        return f"{text}... ({value['length']} {unit})" if "length" in value else text
    return _line(str(value))


def _result_text(result: StatementResult, room: int) -> str:
    """Write one result in about ``room`` characters, but at least its first row."""
    if result.columns is None:
        return "done" if result.changed is None else f"{_count(result.changed, 'row')} changed"
    table = [[_line(name) for name in result.columns]]
    table += [[cell_text(value) for value in row] for row in result.rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    fitting = max(1, room // (sum(widths) + 3 * len(widths)) - _FRAME_LINES)
    shown = table[1 : 1 + fitting]
    widths = [max(map(len, column)) for column in zip(table[0], *shown, strict=True)]
    lines = [_row(table[0], widths), "-+-".join("-" * width for width in widths)]
    lines += [_row(row, widths) for row in shown]
    lines.append(_footer(result, len(shown)))
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align one row."""
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return " | ".join(padded).rstrip()


def _footer(result: StatementResult, shown: int) -> str:
    """Count the rows, and say what is not shown."""
    text = _count(result.num_rows, "row") if result.num_rows else "no rows"
    if result.num_rows > shown:
        text += f", {result.num_rows - shown} of them not shown"
    if result.columns is not None and result.num_columns > len(result.columns):
        hidden = result.num_columns - len(result.columns)
        text += f"; {_count(hidden, 'more column')} not shown"
    if result.changed is not None:
        text += f"; {_count(result.changed, 'row')} changed"
    return f"({text})"


def _count(number: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _line(text: str) -> str:
    """Keep a text on one line and show its control characters."""
    return show_controls(text.replace("\n", "\\n").replace("\t", "\\t"))
