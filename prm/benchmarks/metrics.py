"""The published metrics of step benchmarks, as formulas of sums over rows.

Every metric here is a function of column sums: a row of the benchmark adds to a few columns (hits
and cases of its kind), and the metric is computed from the totals. So the bootstrap over problems
needs no second implementation: it re-weights the rows and applies the same formula.

Dimension letters: N rows, M columns, K problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prm.metrics import Array, Estimate

Formula = Callable[[Array], Array]
"""Column sums of shape (R, M) to values of shape (R,), NaN where undefined."""


def estimate_from_sums(
    columns_NM: Array,
    problems: Sequence[str],
    formula: Formula,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Compute a metric of column sums with its 95 % bootstrap interval over problems.

    Parameters
    ----------
    columns_NM : array, shape (N, M)
        What each row adds to each column.
    problems : sequence of str, length N
        Rows of one problem are drawn together.
    formula : callable
        The metric.
    resamples : int, default=1000
        Bootstrap resamples of whole problems.
    seed : int, default=0
        The same seed gives the same interval.

    Returns
    -------
    Estimate
        Without a value where the formula is undefined on the whole sample, without an interval
        where it is in over a tenth of the resamples.

    Examples
    --------
    >>> hits = np.array([[1.0, 1], [0, 1], [1, 1], [1, 1]])
    >>> estimate_from_sums(hits, list("abcd"), rate).value
    0.75
    """
    if len(problems) == 0:
        return Estimate(value=None, reason="no rows")
    value = float(formula(columns_NM.sum(axis=0)[None])[0])
    if np.isnan(value):
        return Estimate(value=None, reason="no case of a kind that it needs")
    numbers = {problem: i for i, problem in enumerate(dict.fromkeys(problems))}
    if len(numbers) < 2:
        return Estimate(value=value, reason="one problem only: no interval")
    totals_KM = np.zeros((len(numbers), columns_NM.shape[1]))
    np.add.at(totals_KM, [numbers[p] for p in problems], columns_NM)
    size = len(numbers)
    draws_RK = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)
    values_R = formula(draws_RK @ totals_KM)
    values_R = values_R[~np.isnan(values_R)]
    if len(values_R) < 0.9 * resamples:
        return Estimate(value=value, reason="undefined in over a tenth of the resamples")
    low, high = np.quantile(values_R, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def _ratio(above: Array, below: Array) -> Array:
    """Divide, NaN where there is nothing to divide by."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def rate(sums_RM: Array) -> Array:
    """Return hits / cases, from the columns (hits, cases)."""
    return _ratio(sums_RM[:, 0], sums_RM[:, 1])


def first_error(scores: Sequence[float], threshold: float) -> int:
    """Return the 0-based index of the first step scored below a threshold, -1 if none is.

    Examples
    --------
    >>> first_error([0.9, 0.4, 0.1], 0.5), first_error([0.9, 0.5], 0.5)
    (1, -1)
    """
    return next((n for n, score in enumerate(scores) if score < threshold), -1)


def processbench_columns(predictions: Sequence[int], labels: Sequence[int]) -> Array:
    """Return what solutions add to (wrong found, wrong, right passed, right), shape (N, 4).

    Parameters
    ----------
    predictions, labels : sequence of int
        Index of the first wrong step, -1 for none. A wrong solution counts as found only where
        the very step is named.

    Examples
    --------
    >>> processbench_columns([1, 0, -1, 2], [1, 2, -1, -1]).sum(axis=0).tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    wrong, match = true != -1, predicted == true
    return np.stack([match & wrong, wrong, match & ~wrong, ~wrong], axis=1).astype(np.float64)


def processbench_f1(sums_RM: Array) -> Array:
    """Return ProcessBench's F1, averaged plainly over subsets.

    Parameters
    ----------
    sums_RM : array, shape (R, 4 U)
        For each of U subsets the columns of `processbench_columns`.

    Notes
    -----
    Per subset ``F1 = 2 a b / (a + b)`` with ``a`` the share of wrong solutions whose first wrong
    step is named exactly and ``b`` the share of right solutions in which none is named; 0 where
    both are 0. The benchmark's figure is the plain mean over subsets, whatever their sizes.

    References
    ----------
    Zheng et al., ProcessBench, arXiv:2412.06559; QwenLM/ProcessBench, ``code/run_eval.py``.

    Examples
    --------
    >>> processbench_f1(np.array([[1.0, 2, 1, 1]])).round(4).tolist()
    [0.6667]
    >>> processbench_f1(np.array([[0.0, 2, 0, 1]])).tolist()
    [0.0]
    """
    scores = []
    for start in range(0, sums_RM.shape[1], 4):
        found, wrong, passed, right = sums_RM[:, start : start + 4].T
        a, b = _ratio(found, wrong), _ratio(passed, right)
        scores.append(np.where(a + b == 0, 0.0, 2 * a * b / np.where(a + b == 0, 1, a + b)))
    mean_R: Array = np.mean(scores, axis=0)
    return mean_R


def confusion_columns(predicted_right: Sequence[bool], right: Sequence[bool]) -> Array:
    """Return what one solution's steps add to (TP, FP, TN, FN), shape (4,); right is positive.

    Examples
    --------
    >>> confusion_columns([True, True, False, False], [True, False, False, True]).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    p, r = np.asarray(predicted_right, dtype=bool), np.asarray(right, dtype=bool)
    counts = [(p & r).sum(), (p & ~r).sum(), (~p & ~r).sum(), (~p & r).sum()]
    return np.asarray(counts, dtype=np.float64)


def right_f1(sums_RM: Array) -> Array:
    """Return the F1 of right steps, ``2 TP / (2 TP + FP + FN)``, from (TP, FP, TN, FN)."""
    tp, fp, _, fn = sums_RM.T
    return _ratio(2 * tp, 2 * tp + fp + fn)


def wrong_f1(sums_RM: Array) -> Array:
    """Return the F1 of wrong steps, ``2 TN / (2 TN + FP + FN)``, from (TP, FP, TN, FN)."""
    _, fp, tn, fn = sums_RM.T
    return _ratio(2 * tn, 2 * tn + fp + fn)


def prm_score(sums_RM: Array) -> Array:
    """Return PRMBench's PRMScore, the mean of the F1 of right and of wrong steps.

    Notes
    -----
    ``0.5 F1 + 0.5 F1_neg`` over all steps of all solutions (Song et al., arXiv:2501.03124;
    ssmisya/PRMBench, ``mr_eval/tasks/prmtest_classified/task.py``). The class
    ``multi_solutions`` holds no wrong step; alone, its figure is `right_f1`.

    Examples
    --------
    >>> prm_score(np.array([[6.0, 1, 2, 1]])).round(4).tolist()
    [0.7619]
    """
    return 0.5 * right_f1(sums_RM) + 0.5 * wrong_f1(sums_RM)


def last_is_lowest(scores: Sequence[float]) -> bool:
    """Tell whether the lowest score stands at the last step only.

    A step model that often has it there judges outcomes (arXiv:2501.07301).

    Examples
    --------
    >>> last_is_lowest([0.9, 0.2]), last_is_lowest([0.2, 0.2]), last_is_lowest([0.1, 0.2])
    (True, False, False)
    """
    return len(scores) > 1 and scores[-1] < min(scores[:-1])
