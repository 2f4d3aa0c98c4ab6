"""Turns Monte-Carlo counts into step values with intervals: pure functions, one table.

An estimator sees one state at a time as ``(n, c, level)``: usable rollouts, right ones, and the
coverage its interval aims at. Which rollouts are usable is decided once, in `label_steps`: failed
ones (broken tools or engine) never are; truncated ones count as wrong or are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from trajectory.records import StepEvidence, StepLabels

Truncated: TypeAlias = Literal["wrong", "exclude"]

Progress: TypeAlias = Literal["difference", "ratio"]

_LATTICE = 4000
"""Pairs of posterior quantiles behind an interval of progress."""

JEFFREYS = 0.5
"""Pseudo-count of one success and of one failure in Jeffreys' prior, in rollouts."""


class Estimate(NamedTuple):
    """A value in [0, 1] with the interval that contains it."""

    value: float
    low: float
    high: float


Estimator: TypeAlias = Callable[[int, int, float], Estimate]


def hard(n: int, c: int, level: float) -> Estimate:
    """Estimate whether the right answer can be reached at all: 1 after any success, else 0.

    Parameters
    ----------
    n : int
        Usable rollouts, >= 1.
    c : int
        Right ones, 0..n.
    level : float
        Coverage of the interval, in [0.5, 1). It changes nothing here (see Notes).

    Returns
    -------
    Estimate
        Value 0 or 1.

    Notes
    -----
    The estimand is ``1[V > 0]``. One success settles it, so the interval is (1, 1); no number of
    wrong rollouts can rule out a small ``V``, so the interval is then (0, 1).

    References
    ----------
    .. [1] Wang et al., Math-Shepherd, arXiv:2312.08935, equation 3 (hard estimation).

    Examples
    --------
    >>> hard(8, 1, 0.9)
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    _check(n, c, level)
    return Estimate(1.0, 1.0, 1.0) if c else Estimate(0.0, 0.0, 1.0)


def soft(n: int, c: int, level: float) -> Estimate:
    """Estimate the success probability as the share of right rollouts, with Wilson's interval.

    Parameters
    ----------
    n : int
        Usable rollouts, >= 1.
    c : int
        Right ones, 0..n.
    level : float
        Coverage of the interval, in [0.5, 1).

    Returns
    -------
    Estimate
        Unbiased for a fixed ``n``.

    Notes
    -----
    ``v = c / n``; with ``z`` the normal quantile of ``(1 + level) / 2`` the interval is
    ``(v + z^2/2n -+ z sqrt(v(1-v)/n + z^2/4n^2)) / (1 + z^2/n)``. Its coverage oscillates with
    ``V`` and is ``level`` on average.

    References
    ----------
    .. [1] Wang et al., Math-Shepherd, arXiv:2312.08935, equation 4 (soft estimation).
    .. [2] Brown, Cai, DasGupta, Interval estimation for a binomial proportion, Statistical
       Science 16(2), 2001, the Wilson interval.

    Examples
    --------
    >>> [round(x, 3) for x in soft(8, 0, 0.95)]
    [0.0, 0.0, 0.324]
    """
    _check(n, c, level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    value = c / n
    scale = 1 + z * z / n
    middle = (value + z * z / (2 * n)) / scale
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n)) / scale
    # In exact arithmetic the bounds at c = 0 and c = n are 0 and 1; in floats they miss by 1e-17.
    low = 0.0 if c == 0 else max(0.0, middle - half)
    high = 1.0 if c == n else min(1.0, middle + half)
    return Estimate(value, low, high)


def smoothed(n: int, c: int, level: float) -> Estimate:
    """Estimate the success probability by the posterior mean under Jeffreys' prior.

    Parameters
    ----------
    n : int
        Usable rollouts, >= 1.
    c : int
        Right ones, 0..n.
    level : float
        Coverage of the interval, in [0.5, 1).

    Returns
    -------
    Estimate
        Shrunk towards one half, strictly between 0 and 1.

    Notes
    -----
    ``v = (c + a) / (n + 2a)`` with ``a = 1/2``, the mean of Beta(c + a, n - c + a). The interval
    holds equal tails of that posterior, except that it reaches 0 when ``c = 0`` and 1 when
    ``c = n``, which keeps its coverage up near the edges [1]_.

    References
    ----------
    .. [1] Brown, Cai, DasGupta, Interval estimation for a binomial proportion, Statistical
       Science 16(2), 2001, the equal-tailed Jeffreys interval.

    Examples
    --------
    >>> smoothed(4, 2, 0.9).value, smoothed(4, 4, 0.9).value
    (0.5, 0.9)
    """
    _check(n, c, level)
    right, wrong = c + JEFFREYS, n - c + JEFFREYS
    tail = (1 - level) / 2
    low = 0.0 if c == 0 else float(betaincinv(right, wrong, tail))
    high = 1.0 if c == n else float(betaincinv(right, wrong, 1 - tail))
    return Estimate(right / (right + wrong), low, high)


def progress(
    before: tuple[int, int], after: tuple[int, int], level: float, *, kind: Progress
) -> Estimate:
    """Estimate what a step changed: the difference or the ratio of two states' values.

    Parameters
    ----------
    before, after : tuple of int
        ``(n, c)`` of the state before and after the step, n >= 1.
    level : float
        Coverage of the interval, in [0.5, 1).
    kind : {"difference", "ratio"}
        ``V_t - V_{t-1}`` in [-1, 1], or ``min(1, V_t / V_{t-1})`` in [0, 1].

    Returns
    -------
    Estimate
        Made from posterior means (see `smoothed`), with equal tails of the posterior.

    Notes
    -----
    The posterior of the change is that of two independent Beta variables, taken from 4,000 pairs
    of quasi-random quantiles, the same ones for every call: no chance enters, and the interval
    misses the exact one by about 0.001. States that share rollouts are treated as independent.

    References
    ----------
    .. [1] Setlur et al., Rewarding progress, arXiv:2410.08146, section 3 (difference).

    Examples
    --------
    >>> [round(x, 2) for x in progress((8, 8), (8, 0), 0.9, kind="difference")]
    [-0.89, -0.99, -0.68]
    >>> round(progress((8, 4), (8, 8), 0.9, kind="ratio").value, 2)
    1.0
    """
    for n, c in (before, after):
        _check(n, c, level)
    first, second = (_posterior_draws(n, c, axis) for axis, (n, c) in enumerate((before, after)))
    means = [(c + JEFFREYS) / (n + 2 * JEFFREYS) for n, c in (before, after)]
    if kind == "difference":
        value, draws = means[1] - means[0], second - first
    else:
        value, draws = min(1.0, means[1] / means[0]), np.minimum(1.0, second / first)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _posterior_draws(n: int, c: int, axis: int) -> NDArray[np.float64]:
    """Return the posterior's quantiles at one axis of a fixed two-dimensional lattice."""
    steps = np.arange(_LATTICE)
    # The golden ratio spreads the pairs evenly over the square, whatever the two posteriors are.
    places = (steps + 0.5) / _LATTICE if axis == 0 else (0.5 + steps * 0.6180339887498949) % 1
    draws: NDArray[np.float64] = betaincinv(c + JEFFREYS, n - c + JEFFREYS, places)
    return draws


ESTIMATORS: Mapping[str, Estimator] = {"hard": hard, "soft": soft, "smoothed": smoothed}
RATIO, STOPPED, BACKED_UP = "ratio", "stopped", "backed_up"
ALL_ESTIMATORS = (*ESTIMATORS, RATIO, STOPPED, BACKED_UP)
"""Names of `ESTIMATORS`, of the ratio to the value before (`progress`), of
`labeling.stopping.stopped`, which needs to know the rule, and of `labeling.backup`, which needs
all states of a task."""


def usable_counts(evidence: StepEvidence, truncated: Truncated) -> tuple[tuple[int, int], ...]:
    """Return ``(n, c)``, usable and right rollouts, of every prefix 0..S.

    Parameters
    ----------
    evidence : StepEvidence
        Counts per prefix.
    truncated : {"wrong", "exclude"}
        ``wrong``: a rollout cut off by a limit counts as a wrong one, so a value is the chance of
        success *within the limits*. ``exclude``: it counts as no rollout, so a value is the
        chance of success among rollouts that end; that favours states from which only the easy
        continuations end in time.
    """
    pairs = []
    for n, c, u, f in zip(
        evidence.rollouts, evidence.correct, evidence.truncated, evidence.failed, strict=True
    ):
        pairs.append((n - f if truncated == "wrong" else n - f - u, c))
    return tuple(pairs)


def label_steps(
    evidence: StepEvidence,
    estimator: str = "soft",
    *,
    level: float = 0.9,
    truncated: Truncated = "wrong",
    special: Callable[[int, int, float], Estimate | None] | None = None,
) -> StepLabels:
    """Estimate the value of every prefix of one trajectory.

    Parameters
    ----------
    evidence : StepEvidence
        Counts for prefixes 0..S.
    estimator : str
        One of `ALL_ESTIMATORS`. ``ratio`` gives what each step left of the value before it, so
        prefix 0 has none.
    level : float
        Coverage of the intervals, in [0.5, 1).
    truncated : {"wrong", "exclude"}
        What a cut-off rollout counts as, see `usable_counts`.
    special : callable, optional
        The function behind a name that is no row of `ESTIMATORS`, such as ``stopped``; None from
        it is an unknown value.

    Returns
    -------
    StepLabels
        S + 1 values; None, with no interval, where no rollout was usable.

    Raises
    ------
    ValueError
        If ``level`` is out of range.
    KeyError
        If the estimator is unknown.

    Examples
    --------
    >>> from trajectory.records import Sampling
    >>> evidence = StepEvidence(
    ...     trajectory_id="a", rollouts=(4, 4, 2), correct=(1, 0, 0), truncated=(0, 2, 0),
    ...     failed=(0, 0, 2), completer="m", sampling=Sampling(), tokens=9,
    ... )
    >>> label_steps(evidence, "soft").values
    (0.25, 0.0, None)
    """
    counts = usable_counts(evidence, truncated)
    found: list[Estimate | None]
    if estimator == RATIO:
        steps = itertools.pairwise(counts)
        found = [None]
        found += [progress(a, b, level, kind="ratio") if a[0] and b[0] else None for a, b in steps]
    else:
        estimate = special or ESTIMATORS[estimator]
        found = [estimate(n, c, level) if n else None for n, c in counts]
    return StepLabels(
        trajectory_id=evidence.trajectory_id,
        estimator=estimator,
        values=tuple(None if e is None else e.value for e in found),
        low=tuple(None if e is None else e.low for e in found),
        high=tuple(None if e is None else e.high for e in found),
    )


def _check(n: int, c: int, level: float) -> None:
    """Refuse counts that are none and levels at which a mean may leave its own interval."""
    if not 0 <= c <= n or n < 1:
        raise ValueError(f"counts must satisfy 0 <= c <= n and n >= 1, not n = {n}, c = {c}")
    if not 0.5 <= level < 1:
        raise ValueError(f"level must be in [0.5, 1), not {level}")
