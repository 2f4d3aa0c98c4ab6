"""Choosing one of N candidates: by score, by vote, by weighted vote, at random, by an oracle.

Every chooser returns the *expected* correctness of its choice: ties are shared equally, so nothing
depends on the order of candidates.

Dimension letters: N candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from prm.metrics import Array


def by_score(scores: Sequence[float], correct: Sequence[float]) -> float:
    """Return the mean correctness of the candidates with the highest score.

    Examples
    --------
    >>> by_score([0.1, 0.9, 0.9], [1, 1, 0])
    0.5
    """
    best = max(scores)
    return float(np.mean([c for s, c in zip(scores, correct, strict=True) if s == best]))


def by_score_of(scores: Sequence[float], correct: Sequence[float], size: int) -> float:
    """Return the expected correctness of the best-scored of ``size`` candidates drawn at random.

    Parameters
    ----------
    scores, correct : sequence of float, length N
        Score and correctness (0 or 1) of all candidates.
    size : int
        Candidates drawn without replacement, 1 to N.

    Notes
    -----
    Exact, over all subsets: with ``g`` candidates in a group of equal scores, ``a`` above and
    ``b`` below it, the best score is this group's with probability
    ``[C(g + b, size) - C(b, size)] / C(N, size)``, and inside a group all are alike.

    Examples
    --------
    >>> by_score_of([3, 2, 1], [0, 1, 1], 1)
    0.6666666666666666
    >>> by_score_of([3, 2, 1], [0, 1, 1], 2)
    0.3333333333333333
    """
    groups: dict[float, list[float]] = defaultdict(list)
    for score, right in zip(scores, correct, strict=True):
        groups[score].append(right)
    total, below, expected = math.comb(len(scores), size), 0, Fraction(0)
    for score in sorted(groups):
        group = groups[score]
        ways = math.comb(below + len(group), size) - math.comb(below, size)
        expected += Fraction(ways, total) * Fraction(sum(map(float, group))) / len(group)
        below += len(group)
    return float(expected)


def by_vote(
    answers: Sequence[str | None], correct: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Return the mean correctness of the answer with the most votes, or the most weight.

    Parameters
    ----------
    answers : sequence of str or None, length N
        In one form, so that equal answers are equal texts; None has no vote.
    correct : sequence of float, length N
        In [0, 1].
    weights : sequence of float, optional
        Of each vote, >= 0, for example its score; 1 each when not given.

    Returns
    -------
    float
        0 where nobody answered.

    Examples
    --------
    >>> by_vote(["7", "7", "8"], [1, 1, 0]), by_vote(["7", "7", "8"], [1, 1, 0], [0.1, 0.2, 0.9])
    (1.0, 0.0)
    >>> by_vote(["7", "8", None, None], [1, 0, 0, 0])
    0.5
    """
    weighed = [1.0] * len(answers) if weights is None else weights
    mass: dict[str, float] = defaultdict(float)
    rights: dict[str, list[float]] = defaultdict(list)
    for answer, right, weight in zip(answers, correct, weighed, strict=True):
        if answer is not None:
            mass[answer] += weight
            rights[answer].append(right)
    if not mass:
        return 0.0
    most = max(mass.values())
    winners = [a for a in mass if math.isclose(mass[a], most, rel_tol=1e-12, abs_tol=1e-300)]
    return float(np.mean([np.mean(rights[a]) for a in winners]))


def oracle(correct: Sequence[float]) -> float:
    """Return whether any candidate is right: the most that any choice can reach."""
    return float(max(correct))


def at_random(correct: Sequence[float]) -> float:
    """Return the mean correctness: what a choice without any knowledge reaches."""
    return float(np.mean(correct))


def as_columns(values: Sequence[float]) -> Array:
    """Return per-problem values as the columns (value, 1) that `metrics.rate` averages."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
