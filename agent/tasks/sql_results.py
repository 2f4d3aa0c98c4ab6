"""When two query results are the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from trajectory.records import JsonValue

TOLERANCE = 1e-6
"""Largest difference of two equal numbers of which at least one is no integer..."""
RELATIVE_TOLERANCE = 1e-9
"""... or this part of the larger one, where that is more."""

Row = Sequence[JsonValue]
"""Null, numbers, texts, and objects for blobs and long texts (`agent.tools.sql_box`)."""


def same_rows(gold: Sequence[Row], given: Sequence[Row], *, ordered: bool) -> bool:
    """Compare the rows of two results of as many columns.

    Rows are compared in order if ``ordered``, else as multisets: duplicates count. Cells are
    compared by `same_value`.

    Examples
    --------
    >>> same_rows([[1, "a"], [2, "b"]], [[2.0, "b"], [1.0, "a"]], ordered=False)
    True
    >>> same_rows([[1], [2]], [[2], [1]], ordered=True)
    False
    >>> same_rows([[1], [1], [2]], [[1], [2], [2]], ordered=False)
    False
    """
    if len(gold) != len(given):
        return False
    if ordered:
        return all(_same_row(left, right) for left, right in zip(gold, given, strict=True))
    return _same_multiset(gold, given)


def same_value(left: JsonValue, right: JsonValue) -> bool:
    """Compare two cells.

    Two integers are equal if they are the same; other numbers within the tolerance, so that 1
    equals 1.0. Null equals null alone. Texts and blobs are compared exactly; a number never
    equals a text.

    Examples
    --------
    >>> same_value(1, 1.0), same_value(0.1 + 0.2, 0.3), same_value(1, "1"), same_value(None, 0)
    (True, True, False, False)
    """
    if isinstance(left, int | float) and isinstance(right, int | float):
        if isinstance(left, int) and isinstance(right, int):
            return left == right
        return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=TOLERANCE)
    return type(left) is type(right) and left == right


def _same_row(left: Row, right: Row) -> bool:
    """Compare two rows cell by cell."""
    return len(left) == len(right) and all(map(same_value, left, right))


def _same_multiset(gold: Sequence[Row], given: Sequence[Row]) -> bool:
    """Pair every gold row with a row of its own.

    Rows with identical cells are paired by counting. What remains differs in the last digits of
    some numbers at most: sorted by everything else and then by the numbers, partners are near
    each other, so the search for them is short.
    """
    common = Counter(map(_key, gold)) & Counter(map(_key, given))
    left, right = _without(gold, common), _without(given, common)
    for row in left:
        partner = next((i for i, other in enumerate(right) if _same_row(row, other)), None)
        if partner is None:
            return False
        del right[partner]
    return True


def _without(rows: Sequence[Row], common: Counter[Hashable]) -> list[Row]:
    """Return the rows that are not among ``common``, sorted."""
    budget = Counter(common)
    rest = []
    for row in rows:
        key = _key(row)
        if budget[key] > 0:
            budget[key] -= 1
        else:
            rest.append(row)
    return sorted(rest, key=_rank)


def _key(row: Row) -> Hashable:
    """Return what identical rows have in common; 1 and 1.0 are identical."""
    return tuple(_hashable(cell) for cell in row)


def _hashable(cell: JsonValue) -> Hashable:
    """Return a cell as something to count by."""
    return tuple(sorted(cell.items())) if isinstance(cell, dict) else cell  # type: ignore[return-value]


def _rank(row: Row) -> tuple[list[str], list[float]]:
    """Order rows by their texts first and their numbers last."""
    numbers = [float(cell) for cell in row if isinstance(cell, int | float)]
    return [repr(cell) for cell in row if not isinstance(cell, int | float)], numbers
