"""Aggregations: the scores of a trajectory's prefixes as one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trajectory.errors import InputError


def last(values: Sequence[float]) -> float:
    """Return the last score; right for values, whose last one knows most.

    Examples
    --------
    >>> last([0.2, 0.9, 0.4])
    0.4
    """
    return values[-1]


def minimum(values: Sequence[float]) -> float:
    """Return the lowest score; right for step correctness, where one wrong step decides.

    Examples
    --------
    >>> minimum([0.2, 0.9, 0.4])
    0.2
    """
    return min(values)


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean.

    Examples
    --------
    >>> mean([0.25, 0.75])
    0.5
    """
    return sum(values) / len(values)


def geometric_mean(values: Sequence[float]) -> float:
    """Return ``(prod v_i)^(1/n)``: like a product, but without its preference for fewer steps.

    Examples
    --------
    >>> round(geometric_mean([0.25, 1.0]), 12)
    0.5
    >>> geometric_mean([0.0, 1.0])
    0.0
    """
    if min(values) <= 0:
        return 0.0
    return math.exp(sum(math.log(v) for v in values) / len(values))


def product(values: Sequence[float]) -> float:
    """Return ``prod v_i``, the probability that all steps are right if they were independent.

    Notes
    -----
    Biased: every further score below 1 lowers it, so it prefers trajectories with fewer steps,
    also where the missing ones were needed. It is offered to compare with work that uses it and
    is no head's default; `geometric_mean` is the same without that preference.

    Examples
    --------
    >>> product([0.5, 0.5]), product([0.5, 0.5, 0.9])
    (0.25, 0.225)
    """
    return math.prod(values)


AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "last": last,
    "min": minimum,
    "mean": mean,
    "geomean": geometric_mean,
    "product": product,
}
"""Name to function of at least one score. Which one is a checkpoint's default follows from its
kind and stands in its ``prm.json``."""


def aggregate(values: Sequence[float], aggregation: str) -> float:
    """Turn scores, at least one, into one number by a row of `AGGREGATIONS`.

    Raises
    ------
    InputError
        If there is no such aggregation.

    Examples
    --------
    >>> aggregate([0.25, 0.75], "mean")
    0.5
    """
    if aggregation not in AGGREGATIONS:
        names = ", ".join(AGGREGATIONS)
        raise InputError(f"unknown aggregation {aggregation!r}; aggregations: {names}")
    return AGGREGATIONS[aggregation](values)
