"""What a score must beat: a logistic regression on features that hold no content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prm.metrics import Array

FOLDS = 5


def cross_fit_logistic(
    features: Array, targets: Array, *, weights: Array, groups: Sequence[str]
) -> Array:
    """Predict (soft) targets with a logistic regression, each group from the other groups.

    Parameters
    ----------
    features : array, shape (N, F)
        Standardised inside.
    targets : array, shape (N,)
        In [0, 1].
    weights : array, shape (N,)
        Of each target, > 0.
    groups : sequence of str, length N
        Items of one group (task) are never on both sides of a fold.

    Returns
    -------
    array, shape (N,)
        Probabilities; the overall rate where there is one group only, and the rate of the other
        groups where those hold one class only.
    """
    num_groups = len(set(groups))
    if num_groups < 2:
        rate = float(np.average(targets, weights=weights)) if num_groups else 0.0
        return np.full(len(targets), rate)
    guesses = np.empty(len(targets))
    folds = GroupKFold(n_splits=min(FOLDS, num_groups))
    for train, test in folds.split(features, groups=groups):
        right, wrong = weights[train] * targets[train], weights[train] * (1 - targets[train])
        if min(right.sum(), wrong.sum()) == 0:
            guesses[test] = right.sum() / (right.sum() + wrong.sum())
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression())
        # A soft target is one item of each class, weighted by how much of it is right and wrong.
        model.fit(
            np.concatenate([features[train]] * 2),
            np.repeat([1, 0], len(train)),
            logisticregression__sample_weight=np.concatenate([right, wrong]),
        )
        guesses[test] = model.predict_proba(features[test])[:, 1]
    return guesses
