"""Quality of scores, with intervals that respect that a task's trajectories belong together.

Point values come from scikit-learn and scipy. Intervals are percentile bootstraps over *tasks*
(cluster bootstrap): actions of one trajectory, and trajectories of one task, are not independent.
All resamples are computed at once from integer weights, so 1000 of them take a moment.

Dimension letters: N items, G groups of equal values, K tasks, R resamples.
Names: ``auroc`` and ``average_precision`` and ``spearman`` are better high; ``brier`` and ``ece``
(errors) better low.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ECE_BINS = 15
"""Equal-mass bins of the expected calibration error."""

_CHUNK = 4_000_000
"""Most entries of one (resamples, items) block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric with its interval, or the reason why it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    """95 % percentile bootstrap interval over tasks."""
    reason: str | None = None
    """Why ``value`` (or the interval) is None."""


def show_estimate(estimate: object) -> str:
    """Write an estimate that went through JSON, with its interval; ``-`` where there is none.

    Examples
    --------
    >>> show_estimate({"value": 0.8871, "low": 0.848, "high": 0.925, "reason": None})
    '0.887 [0.848, 0.925]'
    >>> show_estimate({"value": None, "low": None, "high": None, "reason": "one class only"})
    '- (one class only)'
    """
    if not isinstance(estimate, Mapping):
        return "-"
    if estimate["value"] is None:
        return f"- ({estimate['reason']})"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Items:
    """Scored items: actions, states or trajectories."""

    scores: Array
    """Shape (N,), predictions in [0, 1]."""
    targets: Array
    """Shape (N,), in [0, 1]; 0 or 1 where a metric needs classes."""
    weights: Array
    """Shape (N,), > 0: rollouts behind a soft target, else 1."""
    tasks: NDArray[np.int64]
    """Shape (N,), index of the task an item belongs to."""

    def __len__(self) -> int:
        return len(self.scores)


Weighted = Callable[[Items, Array], Array]
"""(items, weights of shape (R, N)) to values of shape (R,), NaN where undefined."""


def make_items(
    scores: list[float], targets: list[float], tasks: list[str], weights: list[float] | None = None
) -> Items:
    """Build items from lists; tasks are numbered in order of appearance."""
    numbers = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    return Items(
        scores=np.asarray(scores, dtype=np.float64),
        targets=np.asarray(targets, dtype=np.float64),
        weights=np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64),
        tasks=np.asarray([numbers[t] for t in tasks], dtype=np.int64),
    )


def auroc(items: Items) -> float:
    """Area under the ROC curve: the chance that a right item outscores a wrong one."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(items.targets, items.scores, sample_weight=items.weights))


def average_precision(items: Items) -> float:
    """Mean precision over recall, ``sum (R_k - R_{k-1}) P_k``."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(items.targets, items.scores, sample_weight=items.weights))


def brier(items: Items) -> float:
    """Mean squared distance of score and (possibly soft) target."""
    return float(_brier_weighted(items, items.weights[None])[0])


def ece(items: Items) -> float:
    """Measure the expected calibration error over equal-mass bins.

    Notes
    -----
    ``sum_b (w_b / w) |mean score - mean target|`` (Guo et al., arXiv:1706.04599, eq. 3) with bins
    of equal mass instead of equal width, so that none is nearly empty; equal scores share a bin.
    """
    return float(_ece_weighted(items, items.weights[None])[0])


def spearman(items: Items) -> float:
    """Rank correlation of score and target (item weights play no part)."""
    from scipy.stats import spearmanr

    return float(spearmanr(items.scores, items.targets).statistic)


def nll(items: Items) -> float:
    """Mean negative log-likelihood per unit of weight, nats."""
    return float(_nll_weighted(items, items.weights[None])[0])


def _groups(values: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sorting order and where each run of equal values starts in it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return order.astype(np.int64), starts.astype(np.int64)


def _class_mass(items: Items, weights_RN: Array) -> tuple[Array, Array]:
    """Sum the weight of right and wrong items per group of equal scores, ascending."""
    order, starts = _groups(items.scores)
    right = (items.targets >= 0.5)[order]
    ordered_RN = weights_RN[:, order]
    positive_RG = np.add.reduceat(ordered_RN * right, starts, axis=1)
    negative_RG = np.add.reduceat(ordered_RN * ~right, starts, axis=1)
    return positive_RG, negative_RG


def _auroc_weighted(items: Items, weights_RN: Array) -> Array:
    """AUROC under many weightings."""
    positive_RG, negative_RG = _class_mass(items, weights_RN)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG
    wins_R = (positive_RG * (below_RG + 0.5 * negative_RG)).sum(axis=1)
    pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
    return np.where(pairs_R > 0, wins_R / np.where(pairs_R > 0, pairs_R, 1), np.nan)


def _average_precision_weighted(items: Items, weights_RN: Array) -> Array:
    """Average precision under many weightings."""
    positive_RG, negative_RG = (mass[:, ::-1] for mass in _class_mass(items, weights_RN))
    hits_RG, all_RG = np.cumsum(positive_RG, axis=1), np.cumsum(positive_RG + negative_RG, axis=1)
    precision_RG = hits_RG / np.where(all_RG > 0, all_RG, 1)
    total_R = hits_RG[:, -1]
    area_R = (positive_RG * precision_RG).sum(axis=1)
    return np.where(total_R > 0, area_R / np.where(total_R > 0, total_R, 1), np.nan)


def _brier_weighted(items: Items, weights_RN: Array) -> Array:
    """Brier score under many weightings."""
    return _weighted_mean((items.scores - items.targets) ** 2, weights_RN)


def _nll_weighted(items: Items, weights_RN: Array) -> Array:
    """Log-likelihood under many weightings."""
    p = np.clip(items.scores, 1e-7, 1 - 1e-7)
    losses = -(items.targets * np.log(p) + (1 - items.targets) * np.log1p(-p))
    return _weighted_mean(losses, weights_RN)


def _weighted_mean(values: Array, weights_RN: Array) -> Array:
    """Average values under many weightings."""
    means_R: Array = weights_RN @ values / weights_RN.sum(axis=1)
    return means_R


def _ece_weighted(items: Items, weights_RN: Array) -> Array:
    """ECE under many weightings, with the bins of the whole sample."""
    place_N = equal_mass_bins(items.scores)
    member_NB = (place_N[:, None] == np.arange(ECE_BINS)[None]).astype(np.float64)
    gap_RB = (weights_RN * (items.scores - items.targets)) @ member_NB
    error_R: Array = np.abs(gap_RB).sum(axis=1) / weights_RN.sum(axis=1)
    return error_R


def equal_mass_bins(scores: Array) -> NDArray[np.int64]:
    """Assign each item to a bin; bins hold about equally many items, equal scores share one."""
    edges = np.quantile(scores, np.linspace(0, 1, ECE_BINS + 1)[1:-1])
    return np.searchsorted(edges, scores, side="right").astype(np.int64)


def _midranks(values: Array, weights_RN: Array) -> Array:
    """Average ranks of items repeated ``weight`` times, shape (R, N)."""
    order, starts = _groups(values)
    mass_RG = np.add.reduceat(weights_RN[:, order], starts, axis=1)
    rank_RG = np.cumsum(mass_RG, axis=1) - (mass_RG - 1) / 2
    group_N = np.empty(len(values), dtype=np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    return rank_RG[:, group_N]


def _spearman_weighted(items: Items, weights_RN: Array) -> Array:
    """Spearman correlation of resampled items (each repeated as often as it was drawn)."""
    draws_RN = weights_RN / items.weights
    total_R1 = draws_RN.sum(axis=1, keepdims=True)
    centred = []
    for values in (items.scores, items.targets):
        rank_RN = _midranks(values, draws_RN)
        centred.append(rank_RN - (draws_RN * rank_RN).sum(axis=1, keepdims=True) / total_R1)
    x_RN, y_RN = centred
    spread_R = np.sqrt((draws_RN * x_RN**2).sum(axis=1) * (draws_RN * y_RN**2).sum(axis=1))
    product_R = (draws_RN * x_RN * y_RN).sum(axis=1)
    return np.where(spread_R > 1e-12, product_R / np.where(spread_R > 1e-12, spread_R, 1), np.nan)


def _needs_classes(items: Items) -> str | None:
    """Say why a ranking metric is undefined."""
    if len(np.unique(items.targets >= 0.5)) < 2:
        return "all items have the same outcome"
    return None


def _needs_spread(items: Items) -> str | None:
    """Say why a correlation is undefined."""
    if len(items) < 3:
        return "fewer than 3 items"
    for name, values in (("scores", items.scores), ("targets", items.targets)):
        if np.ptp(values) == 0:
            return f"all {name} are equal"
    return None


def _always(items: Items) -> str | None:
    """Say nothing: defined for any items."""
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric: its value, the same under many weightings, and when it is undefined."""

    point: Callable[[Items], float]
    weighted: Weighted
    undefined: Callable[[Items], str | None]


METRICS: dict[str, Metric] = {
    "auroc": Metric(point=auroc, weighted=_auroc_weighted, undefined=_needs_classes),
    "average_precision": Metric(
        point=average_precision, weighted=_average_precision_weighted, undefined=_needs_classes
    ),
    "brier": Metric(point=brier, weighted=_brier_weighted, undefined=_always),
    "ece": Metric(point=ece, weighted=_ece_weighted, undefined=_always),
    "nll": Metric(point=nll, weighted=_nll_weighted, undefined=_always),
    "spearman": Metric(point=spearman, weighted=_spearman_weighted, undefined=_needs_spread),
}


_ONE_TASK = "one task only: no interval"


def estimate(name: str, items: Items, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Compute a metric with its 95 % cluster-bootstrap interval.

    Parameters
    ----------
    name : str
        Row of `METRICS`.
    items : Items
        What was scored.
    resamples : int, default=1000
        Bootstrap resamples of whole tasks.
    seed : int, default=0
        The same seed gives the same interval.

    Returns
    -------
    Estimate
        ``value`` is None, with a reason, where the metric is undefined (one class only, no
        items); the interval is None where there are too few tasks for one.

    Examples
    --------
    >>> items = make_items([0.9, 0.2, 0.7], [1, 0, 1], ["a", "b", "c"])
    >>> estimate("auroc", items).value
    1.0
    """
    metric = METRICS[name]
    reason = _why_undefined(metric, items)
    if reason is not None:
        return Estimate(value=None, reason=reason)
    value = metric.point(items)
    if _num_tasks(items) < 2:
        return Estimate(value=value, reason=_ONE_TASK)
    return _with_interval(value, bootstrap(metric.weighted, items, resamples=resamples, seed=seed))


def estimate_difference(
    name: str, items: Items, other: Items, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Compute by how much a metric of some scores exceeds that of others, both of the same items.

    Parameters
    ----------
    name : str
        Row of `METRICS`.
    items, other : Items
        The same targets, weights and tasks in the same order, scored in two ways.
    resamples : int, default=1000
        Bootstrap resamples of whole tasks, the same for both, so that the interval is of pairs.
    seed : int, default=0
        The same seed gives the same interval.

    Returns
    -------
    Estimate
        As `estimate` gives it.

    Examples
    --------
    >>> tasks, targets = ["a", "b", "c"], [1, 0, 1]
    >>> right = make_items([0.9, 0.2, 0.7], targets, tasks)
    >>> half = make_items([0.9, 0.5, 0.1], targets, tasks)
    >>> estimate_difference("auroc", right, half).value  # 1 - 1 / 2
    0.5
    """
    metric = METRICS[name]
    assert np.array_equal(items.targets, other.targets)
    assert np.array_equal(items.tasks, other.tasks)
    reason = _why_undefined(metric, items) or _why_undefined(metric, other)
    if reason is not None:
        return Estimate(value=None, reason=reason)
    value = metric.point(items) - metric.point(other)
    if _num_tasks(items) < 2:
        return Estimate(value=value, reason=_ONE_TASK)
    one_R, two_R = (
        bootstrap(metric.weighted, i, resamples=resamples, seed=seed) for i in (items, other)
    )
    return _with_interval(value, one_R - two_R)


def _why_undefined(metric: Metric, items: Items) -> str | None:
    """Say why a metric has no value, if it has none."""
    return "no items" if len(items) == 0 else metric.undefined(items)


def _num_tasks(items: Items) -> int:
    """Count the tasks that are resampled."""
    return int(items.tasks.max()) + 1


def _with_interval(value: float, values_R: Array) -> Estimate:
    """Add the middle 95 % of resampled values, if enough of them are defined."""
    defined = values_R[~np.isnan(values_R)]
    if len(defined) < 0.9 * len(values_R):
        return Estimate(value=value, reason="undefined in over a tenth of the resamples")
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def bootstrap(weighted: Weighted, items: Items, *, resamples: int, seed: int) -> Array:
    """Resample tasks with replacement and return the metric of each resample, shape (R,)."""
    rng = np.random.default_rng(seed)
    num_tasks = _num_tasks(items)
    draws_RK = rng.multinomial(num_tasks, np.full(num_tasks, 1 / num_tasks), size=resamples)
    chunk = max(1, _CHUNK // len(items))
    parts = []
    for start in range(0, resamples, chunk):
        weights_RN = draws_RK[start : start + chunk][:, items.tasks] * items.weights
        parts.append(weighted(items, weights_RN.astype(np.float64)))
    return np.concatenate(parts)
