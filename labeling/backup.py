"""Values of a task's states from all its rollouts at once, backed up along its trajectories.

A rollout of a state either goes on to a later state that is measured as well, or elsewhere. What
is known of that later state, from all the rollouts that begin in it or come through it, says more
about the first kind than their own outcomes do; so only *how often* it was reached and what
happened elsewhere is taken from the rollouts of the earlier state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import betaincinv

from labeling.estimators import BACKED_UP, JEFFREYS, Estimate
from labeling.strategies import StateView
from labeling.work import TaskWork
from trajectory.records import StepLabels, Trajectory


class Moments(NamedTuple):
    """Posterior of a value."""

    mean: float
    variance: float


def tree_posterior(states: Sequence[StateView]) -> list[Moments]:
    """Return the posterior mean and variance of every state's value.

    Parameters
    ----------
    states : sequence of StateView
        Every state after its parent; ``reached`` and ``reached_right`` count the rollouts of the
        parent that came through a state.

    Returns
    -------
    list of Moments
        In the same order. A state without a later one has the posterior of
        `labeling.estimators.smoothed`.

    Notes
    -----
    A rollout of a state goes to child ``k`` with probability ``w_k``, or elsewhere with ``w_0``,
    where it succeeds with probability ``q``; hence ``V = sum_k w_k V_k + w_0 q``. Priors are
    Jeffreys': Dirichlet(1/2, ...) for ``w`` and Beta(1/2, 1/2) for ``q``. The counts of moves, of
    successes elsewhere, and of each child's outcomes are independent given the values, so the first
    two moments follow without approximation:
    ``E[V] = sum_k E[w_k] m_k`` and ``E[V^2] = sum_kl E[w_k w_l] m_k m_l + sum_k E[w_k^2] s_k^2``
    with the child's mean ``m_k`` and variance ``s_k^2`` (``q`` is child 0) and the Dirichlet's
    ``E[w_k w_l] = (a_k a_l + [k = l] a_k) / (a (a + 1))``, ``a = sum_k a_k``.

    This is the maximum-likelihood (certainty-equivalence) value of the tree as a Markov chain, with
    its uncertainty; see Sutton and Barto, Reinforcement Learning (2018), section 6.3, on why it has
    a smaller error than the mean of outcomes.
    """
    children: list[list[int]] = [[] for _ in states]
    for i, state in enumerate(states):
        if state.parent is not None:
            children[state.parent].append(i)
    posterior = [Moments(0.5, 0.125)] * len(states)
    for i in range(len(states) - 1, -1, -1):
        posterior[i] = _backed_up(states, i, children[i], posterior)
    return posterior


def _backed_up(
    states: Sequence[StateView], i: int, children: Sequence[int], posterior: Sequence[Moments]
) -> Moments:
    """Combine a state's own counts with what is known of its children."""
    n = states[i].n - sum(states[k].reached for k in children)
    c = states[i].c - sum(states[k].reached_right for k in children)
    elsewhere = beta_moments(c + JEFFREYS, n - c + JEFFREYS)
    if not children:
        return elsewhere
    parts = [(n + JEFFREYS, elsewhere)]
    parts += [(states[k].reached + JEFFREYS, posterior[k]) for k in children]
    total = sum(weight for weight, _ in parts)
    mean = sum(weight * m for weight, (m, _) in parts) / total
    # E[V^2], with the sum over all pairs written as a square plus the diagonal.
    diagonal = sum(weight * (m * m + s) + weight * weight * s for weight, (m, s) in parts)
    square = ((mean * total) ** 2 + diagonal) / (total * (total + 1))
    return Moments(mean, max(0.0, square - mean * mean))


def backed_up_labels(
    work: TaskWork, trajectory: Trajectory, *, level: float, exclude_truncated: bool
) -> StepLabels:
    """Estimate the value of every prefix of one trajectory from all rollouts of its task.

    Parameters
    ----------
    work : TaskWork
        The task with its evidence.
    trajectory : Trajectory
        One of the task's.
    level : float
        Coverage of the intervals, in [0.5, 1).
    exclude_truncated : bool
        Whether cut-off rollouts are left out.

    Returns
    -------
    StepLabels
        S + 1 values; None for states without any usable rollout. The end of a finished trajectory
        has what it showed: 1 or 0.
    """
    states = work.view(exclude_truncated=exclude_truncated).states
    posterior = tree_posterior(states)
    path = work.path(trajectory)
    found = [moment_interval(posterior[i], level) if states[i].n else None for i in path]
    if len(found) == trajectory.num_steps:
        if trajectory.stop.truncated and exclude_truncated:
            found.append(None)
        else:
            right = float(trajectory.outcome is not None and trajectory.outcome >= 0.5)
            found.append(Estimate(right, right, right))
    return StepLabels(
        trajectory_id=trajectory.trajectory_id,
        estimator=BACKED_UP,
        values=tuple(None if e is None else e.value for e in found),
        low=tuple(None if e is None else e.low for e in found),
        high=tuple(None if e is None else e.high for e in found),
    )


def beta_moments(right: float, wrong: float) -> Moments:
    """Return mean and variance of Beta(right, wrong).

    Examples
    --------
    >>> beta_moments(1, 1)
    Moments(mean=0.5, variance=0.08333333333333333)
    """
    size = right + wrong
    return Moments(right / size, right * wrong / (size * size * (size + 1)))


def moment_interval(moments: Moments, level: float) -> Estimate:
    """Return the mean with equal tails of the Beta distribution that has these moments.

    Parameters
    ----------
    moments : Moments
        With a positive variance below ``mean (1 - mean)``.
    level : float
        Coverage, in [0.5, 1).

    Notes
    -----
    As in `labeling.estimators.smoothed` the interval reaches 0 or 1 where the evidence amounts to
    less than half a success, or half a failure, beyond the prior.
    """
    mean, variance = moments
    size = mean * (1 - mean) / variance - 1
    right, wrong = mean * size, (1 - mean) * size
    tail = (1 - level) / 2
    low = float(betaincinv(right, wrong, tail)) if right >= 1 else 0.0
    high = float(betaincinv(right, wrong, 1 - tail)) if wrong >= 1 else 1.0
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"no Beta distribution has mean {mean} and variance {variance}")
    return Estimate(mean, min(low, mean), max(high, mean))
