"""Calibration: make a score of 0.7 mean that 70 % of such states succeed.

Platt scaling of the log-odds, ``p = sigmoid(scale * z + shift)``, fitted by maximum likelihood on
the held-out part (Guo et al., arXiv:1706.04599, section 4; Platt 1999). A scale below 1 is a
temperature above 1. It is fitted on the same binomial counts the model is trained on, stored in
the checkpoint, and never changes the ranking of scores.

Dimension letters beside the project's own: P scored positions.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.optimize import minimize
from scipy.special import expit

from prm.metrics import Array, Items, ece, nll

_MIN_POSITIONS = 20
_SCALES = (0.05, 20.0)
_SHIFTS = (-10.0, 10.0)


class Calibration(BaseModel):
    """Map from raw log-odds to calibrated probability, with what it changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = 1.0
    """Factor on the log-odds, > 0: ranking is kept."""
    shift: float = 0.0
    """Added log-odds."""
    fitted: bool = False
    """False: the identity, for the reason below."""
    reason: str | None = None
    positions: int = 0
    """Held-out positions it was fitted on."""
    ece_before: float | None = None
    ece_after: float | None = None
    """Expected calibration error on those positions, in sample."""
    nll_before: float | None = None
    nll_after: float | None = None
    """Negative log-likelihood per rollout, nats, in sample."""


def apply(calibration: Calibration, margins: Array) -> Array:
    """Turn raw log-odds into calibrated probabilities.

    Examples
    --------
    >>> apply(Calibration(), np.array([0.0])).tolist()
    [0.5]
    >>> round(float(apply(Calibration(scale=2.0, shift=-1.0), np.array([1.0]))[0]), 4)
    0.7311
    """
    probabilities: Array = expit(calibration.scale * margins + calibration.shift)
    return probabilities


def fit(margins_P: Array, targets_P: Array, weights_P: Array) -> Calibration:
    """Fit Platt scaling on held-out positions.

    Parameters
    ----------
    margins_P : array, shape (P,)
        Raw log-odds.
    targets_P : array, shape (P,)
        Soft targets in [0, 1], for example ``c / n``.
    weights_P : array, shape (P,)
        Their weights, for example ``n``; 0 leaves a position out.

    Returns
    -------
    Calibration
        The identity, with the reason, where there are under 20 positions or only one class.
    """
    used = weights_P > 0
    z, y, w = (a[used].astype(np.float64) for a in (margins_P, targets_P, weights_P))
    reason = _unfit_reason(y, w)
    if reason is not None:
        return Calibration(reason=reason, positions=len(z))

    def loss(parameters: Array) -> tuple[float, Array]:
        logits = np.exp(parameters[0]) * z + parameters[1]
        error = w * (expit(logits) - y) / w.sum()
        value = (w * (np.logaddexp(0, logits) - y * logits)).sum() / w.sum()
        return float(value), np.array([(error * z).sum() * np.exp(parameters[0]), error.sum()])

    bounds = [tuple(np.log(_SCALES)), _SHIFTS]
    found = minimize(loss, np.zeros(2), jac=True, bounds=bounds, method="L-BFGS-B")
    fitted = Calibration(scale=float(np.exp(found.x[0])), shift=float(found.x[1]), fitted=True)
    before, after = (_items(apply(c, z), y, w) for c in (Calibration(), fitted))
    return fitted.model_copy(
        update={
            "positions": len(z),
            "ece_before": ece(before),
            "ece_after": ece(after),
            "nll_before": nll(before),
            "nll_after": nll(after),
        }
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
