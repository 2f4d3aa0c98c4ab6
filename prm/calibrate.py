"""Calibration: make a score of 0.7 mean that 70 % of such states succeed.

Two methods, both fitted on the held-out part, on the same counts the model is trained on, and
stored in the checkpoint:

- ``platt``: ``p = sigmoid(scale * z + shift)`` of the log-odds ``z``, by maximum likelihood (Platt
  1999; Guo et al., arXiv:1706.04599, section 4). A scale below 1 is a temperature above 1. It
  keeps the ranking of scores.
- ``isotonic``: the best non-decreasing map, piecewise linear (Zadrozny and Elkan 2002;
  scikit-learn's `IsotonicRegression` on weighted targets). It bends where two numbers cannot, and
  it may give two different log-odds the *same* score: it never swaps scores, but it makes ties.

What a method gains is told by cross-fitting: every held-out position is calibrated by a map fitted
on other tasks. In-sample figures of an isotonic map always look perfect.

Dimension letters beside the project's own: P scored positions, N knots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from scipy.optimize import minimize
from scipy.special import expit

from prm.metrics import Array, Items, ece, nll

Method = Literal["platt", "isotonic", "none"]

FOLDS = 5
"""Parts of the held-out tasks that cross-fitting leaves out in turn."""

_MIN_POSITIONS = 20
_SCALES = (0.05, 20.0)
_SHIFTS = (-10.0, 10.0)


class Calibration(BaseModel):
    """Map from raw log-odds to calibrated probability, with what it changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "platt"
    """How the map was fitted; checkpoints of schema 1.0 knew only ``platt``."""
    scale: float = 1.0
    """``platt``: factor on the log-odds, > 0."""
    shift: float = 0.0
    """``platt``: added log-odds."""
    knots: tuple[float, ...] = ()
    """``isotonic``: log-odds between which the map is linear, strictly increasing."""
    levels: tuple[float, ...] = ()
    """``isotonic``: probability at each knot, not decreasing, within (0, 1)."""
    fitted: bool = False
    """False: the plain sigmoid, for the reason below."""
    reason: str | None = None
    positions: int = 0
    """Held-out positions it was fitted on."""
    ece_before: float | None = None
    ece_after: float | None = None
    """Expected calibration error on those positions, in sample."""
    nll_before: float | None = None
    nll_after: float | None = None
    """Negative log-likelihood per rollout, nats, in sample."""
    ece_cross_fitted: float | None = None
    nll_cross_fitted: float | None = None
    """The same with every task calibrated by a map fitted on other tasks; None: too few tasks."""

    @model_validator(mode="after")
    def _is_a_monotone_map(self) -> Calibration:
        """Refuse a map that would swap scores or leave (0, 1)."""
        if (self.method == "isotonic" and self.fitted) != bool(self.knots):
            raise ValueError("knots belong to a fitted isotonic map, and to no other")
        if len(self.knots) != len(self.levels):
            raise ValueError(f"{len(self.knots)} knots with {len(self.levels)} levels")
        if any(a >= b for a, b in pairwise(self.knots)):
            raise ValueError("knots must increase")
        if any(a > b for a, b in pairwise(self.levels)) or not all(0 < p < 1 for p in self.levels):
            raise ValueError("levels must not decrease and must lie within (0, 1)")
        return self


def apply(calibration: Calibration, margins: Array) -> Array:
    """Turn raw log-odds into calibrated probabilities.

    Examples
    --------
    >>> apply(Calibration(), np.array([0.0])).tolist()
    [0.5]
    >>> round(float(apply(Calibration(scale=2.0, shift=-1.0), np.array([1.0]))[0]), 4)
    0.7311
    >>> steps = Calibration(method="isotonic", fitted=True, knots=(0.0, 2.0), levels=(0.2, 0.6))
    >>> apply(steps, np.array([-9.0, 1.0, 9.0])).tolist()
    [0.2, 0.4, 0.6]
    """
    if calibration.knots:
        levels: Array = np.interp(margins, calibration.knots, calibration.levels)
        return levels
    probabilities: Array = expit(calibration.scale * margins + calibration.shift)
    return probabilities


def fit(
    margins_P: Array,
    targets_P: Array,
    weights_P: Array,
    *,
    method: Method = "platt",
    groups: Sequence[str] | None = None,
) -> Calibration:
    """Fit a calibration on held-out positions.

    Parameters
    ----------
    margins_P : array, shape (P,)
        Raw log-odds.
    targets_P : array, shape (P,)
        Soft targets in [0, 1], for example ``c / n``.
    weights_P : array, shape (P,)
        Their weights, for example ``n``; 0 leaves a position out.
    method : {"platt", "isotonic", "none"}, default="platt"
        ``none`` measures the error of the plain sigmoid and changes nothing.
    groups : sequence of str, length P, optional
        Task of every position, for the cross-fitted figures; None leaves them out.

    Returns
    -------
    Calibration
        The identity, with the reason, where there are under 20 positions or only one class.
    """
    used = weights_P > 0
    z, y, w = (a[used].astype(np.float64) for a in (margins_P, targets_P, weights_P))
    reason = _unfit_reason(y, w)
    if reason is not None:
        return Calibration(method=method, reason=reason, positions=len(z))
    fitted = _fit_map(method, z, y, w)
    before, after = (_items(apply(c, z), y, w) for c in (Calibration(), fitted))
    crossed = None
    if groups is not None:
        chosen = np.asarray(groups)[used]
        crossed = cross_fit(z, y, w, method=method, groups=chosen.tolist())
    found = None if crossed is None else _items(crossed, y, w)
    return fitted.model_copy(
        update={
            "positions": len(z),
            "ece_before": ece(before),
            "ece_after": ece(after),
            "nll_before": nll(before),
            "nll_after": nll(after),
            "ece_cross_fitted": None if found is None else ece(found),
            "nll_cross_fitted": None if found is None else nll(found),
        }
    )


def describe(calibration: Calibration) -> str:
    """Say in one line what a calibration does to the expected calibration error."""
    if calibration.ece_before is None:
        return f"not calibrated: {calibration.reason}"
    before = f"expected calibration error {calibration.ece_before:.4f}"
    if not calibration.fitted:
        return f"not calibrated ({calibration.reason}): {before}"
    crossed = calibration.ece_cross_fitted
    shown = "unknown (too few tasks)" if crossed is None else f"{crossed:.4f}"
    return (
        f"calibrated ({calibration.method}, {calibration.positions} held-out positions): {before} "
        f"before, {shown} after on tasks left out of the fit, {calibration.ece_after:.4f} in sample"
    )


def cross_fit(
    margins_P: Array,
    targets_P: Array,
    weights_P: Array,
    *,
    method: Method,
    groups: Sequence[str],
) -> Array | None:
    """Calibrate every position by a map fitted on the tasks of other folds.

    Returns
    -------
    array, shape (P,), or None
        Probabilities; None with under two tasks, or where a fold leaves nothing to fit.
    """
    from sklearn.model_selection import GroupKFold

    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        return None
    result = np.empty(len(margins_P))
    for rest, left_out in GroupKFold(folds).split(margins_P, groups=groups):
        y, w = targets_P[rest], weights_P[rest]
        if _unfit_reason(y, w) is not None:
            return None
        result[left_out] = apply(_fit_map(method, margins_P[rest], y, w), margins_P[left_out])
    return result


def _fit_map(method: Method, z: Array, y: Array, w: Array) -> Calibration:
    """Fit the map alone, without figures."""
    if method == "isotonic":
        return _fit_isotonic(z, y, w)
    if method == "platt":
        return _fit_platt(z, y, w)
    return Calibration(method="none", reason="switched off")


def _fit_platt(z: Array, y: Array, w: Array) -> Calibration:
    """Maximise the likelihood over scale and shift."""

    def loss(parameters: Array) -> tuple[float, Array]:
        logits = np.exp(parameters[0]) * z + parameters[1]
        error = w * (expit(logits) - y) / w.sum()
        value = (w * (np.logaddexp(0, logits) - y * logits)).sum() / w.sum()
        return float(value), np.array([(error * z).sum() * np.exp(parameters[0]), error.sum()])

    bounds = [tuple(np.log(_SCALES)), _SHIFTS]
    found = minimize(loss, np.zeros(2), jac=True, bounds=bounds, method="L-BFGS-B")
    return Calibration(scale=float(np.exp(found.x[0])), shift=float(found.x[1]), fitted=True)


def _fit_isotonic(z: Array, y: Array, w: Array) -> Calibration:
    """Pool adjacent violators; keep the corners of the map.

    Levels stay within ``[1/(W+2), 1 - 1/(W+2)]`` for a total weight W: no number of rollouts shows
    that a probability is exactly 0 or 1, and one rollout to the contrary would cost infinitely.
    """
    from sklearn.isotonic import IsotonicRegression

    bound = 1 / (w.sum() + 2)
    found = IsotonicRegression(y_min=bound, y_max=1 - bound).fit(z, y, sample_weight=w)
    return Calibration(
        method="isotonic",
        knots=tuple(found.X_thresholds_.tolist()),
        levels=tuple(found.y_thresholds_.tolist()),
        fitted=True,
    )


def _unfit_reason(targets: Array, weights: Array) -> str | None:
    """Say why nothing can be fitted."""
    if len(targets) < _MIN_POSITIONS:
        return f"only {len(targets)} held-out positions, {_MIN_POSITIONS} are needed"
    rate = float(np.average(targets, weights=weights))
    if rate in (0.0, 1.0):
        return "all held-out positions have the same outcome"
    return None


def _items(scores: Array, targets: Array, weights: Array) -> Items:
    """Wrap arrays for the metrics."""
    tasks = np.zeros(len(scores), dtype=np.int64)
    return Items(scores=scores, targets=targets, weights=weights, tasks=tasks)
