"""Where the last expression of a cell is, found by its tokens alone.

For interpreters that are not CPython: ``ast.parse`` in this process would apply another grammar
than theirs, and untrusted text can exhaust the parser's stack. Tokens cost linear time.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from dataclasses import dataclass

_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_BLOCKS = {"if", "elif", "else", "for", "while", "with", "try", "except", "finally"}
_BLOCKS |= {"def", "class", "async", "@"}
_STATEMENTS = set(keyword.kwlist) - {"None", "True", "False", "lambda", "not", "await"} | {"@"}
_ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "//=", "%=", "**=", "@=", "&=", "|=", "^="}
_ASSIGNMENTS |= {"<<=", ">>="}

MAX_CHARS = 32_768
"""Longer cells get no answer: 100,000 tokens take 0.3 s."""

Position = tuple[int, int]
"""Line, from 1, and column, from 0."""


@dataclass
class _Statement:
    """What is known of the statement that the scan is in."""

    start: Position
    end: Position
    expression: bool


def final_expression(code: str) -> tuple[int, int] | None:
    """Return where the last statement begins and ends if it may be an expression.

    Only the interpreter can say whether it is one: a caller must accept that it is not.

    Parameters
    ----------
    code : str
        A cell.

    Returns
    -------
    tuple of int or None
        Offsets in ``code``; None if the last statement is no expression, or the text has no
        statements or is longer than `MAX_CHARS`.

    Examples
    --------
    >>> code = "x = [1]; x + [2]  # two"
    >>> start, end = final_expression(code)
    >>> code[start:end]
    'x + [2]'
    >>> final_expression("for x in y: x") is None
    True
    """
    if len(code) > MAX_CHARS:
        return None
    try:
        last = _last_statement(code)
    except (tokenize.TokenError, SyntaxError):  # the interpreter will say what is wrong
        return None
    if last is None or not last.expression:
        return None
    lengths = [len(line) + 1 for line in code.split("\n")]
    start, end = (sum(lengths[: row - 1]) + column for row, column in (last.start, last.end))
    return start, end


def _last_statement(code: str) -> _Statement | None:
    """Scan the tokens; statements inside blocks count as part of no expression."""
    statement: _Statement | None = None
    in_statement = in_block_line = False
    indents = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(code, newline="\n").readline):
        if token.type in _SKIPPED:
            indents += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            continue
        ends_line = token.type == tokenize.NEWLINE
        if ends_line or (token.string == ";" and depth == 0):
            in_statement = False
            in_block_line = in_block_line and not ends_line
            continue
        if statement is None or not in_statement:
            in_statement = True
            in_block_line = in_block_line or indents > 0 or token.string in _BLOCKS
            expression = not in_block_line and token.string not in _STATEMENTS
            statement = _Statement(token.start, token.end, expression)
        statement.end = token.end
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if depth == 0 and token.string in _ASSIGNMENTS:
                statement.expression = False
    return statement
