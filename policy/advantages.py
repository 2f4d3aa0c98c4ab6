"""How much better than expected each action was: pure functions, one table at the end.

The rule all of them follow: a per-step policy gradient is unbiased only if the baseline of step k
does not depend on the trajectory's own actions at or after k. So returns-to-go are centred, never
step rewards before they are summed, and a group baseline leaves the trajectory itself out.

Dimension letters: G group, S steps. Arrays of steps are ragged over the group: one array per
trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """The trajectories sampled for one task under one policy."""

    outcomes: FloatArray
    """Outcome reward of each trajectory, shape (G,), finite."""
    num_steps: tuple[int, ...]
    """S of each trajectory, >= 0."""
    values: tuple[FloatArray, ...] | None = None
    """PRM value of the prefixes 0..S of each trajectory, shapes (S + 1,); None without a PRM."""

    def __post_init__(self) -> None:
        if self.outcomes.shape != (len(self.num_steps),) or not len(self.num_steps):
            raise ValueError(
                f"a group needs one outcome per trajectory: outcomes of shape "
                f"{self.outcomes.shape} for {len(self.num_steps)} trajectories"
            )
        if not np.all(np.isfinite(self.outcomes)):
            raise ValueError("an outcome is not finite; failed trajectories leave the group first")
        if self.values is None:
            return
        shapes = [v.shape for v in self.values]
        if shapes != [(s + 1,) for s in self.num_steps]:
            raise ValueError(f"values of shapes {shapes} for {self.num_steps} steps (+ 1 each)")
        if not all(np.all(np.isfinite(v)) for v in self.values):
            raise ValueError("a PRM value is missing or not finite; a missing score is never 0")


AdvantageFunction: TypeAlias = Callable[[Group, float], tuple[FloatArray, ...]]


def outcome_advantages(group: Group, gae_lambda: float = 1.0) -> tuple[FloatArray, ...]:
    """Compare each outcome with the mean of the *other* trajectories of its group (RLOO).

    Parameters
    ----------
    group : Group
        G >= 2 trajectories; values are not used.
    gae_lambda : float, default=1.0
        Must be 1: a single outcome has no horizon to discount over.

    Returns
    -------
    tuple of ndarray, shapes (S,)
        One number per step, the same for all steps of a trajectory.

    Raises
    ------
    ValueError
        If the group has one trajectory only (there is nothing to compare with) or gae_lambda != 1.

    Notes
    -----
    ``A_i = R_i - 1 / (G - 1) sum_{j != i} R_j`` for every step of trajectory i [1]_. The sum over
    the group is zero. Unbiased.

    References
    ----------
    .. [1] Ahmadian et al., Back to Basics, arXiv:2402.14740 (REINFORCE leave-one-out).

    Examples
    --------
    >>> group = Group(outcomes=np.array([1.0, 0.0, 0.0]), num_steps=(2, 1, 1))
    >>> outcome_advantages(group)
    (array([1., 1.]), array([-0.5]), array([-0.5]))
    """
    if gae_lambda != 1.0:
        raise ValueError(f"outcome advantages have no lambda; got {gae_lambda}")
    num = len(group.num_steps)
    if num < 2:
        raise ValueError("outcome advantages compare trajectories: a group needs at least 2")
    others = (group.outcomes.sum() - group.outcomes) / (num - 1)
    advantages = group.outcomes - others
    return tuple(np.full(s, a) for s, a in zip(group.num_steps, advantages, strict=True))


def potential_advantages(
    group: Group, gae_lambda: float = 1.0, *, prior: float = 4.0
) -> tuple[FloatArray, ...]:
    """Use the PRM's values as a potential: each step earns the change in value it made.

    Parameters
    ----------
    group : Group
        G >= 1 trajectories with values.
    gae_lambda : float, default=1.0
        In [0, 1]. 1: the PRM is only a baseline and cannot bias the gradient, however wrong it
        is. 0: a step is paid its own PRM progress alone (lowest variance, full trust in the PRM).
        Below 1 the estimate is *biased* unless the PRM is the exact value of the present policy.
    prior : float, default=4.0
        How many trajectories the PRM's value of the prompt is worth beside the group's own
        outcomes, >= 0; infinite trusts the PRM alone. Unbiased for every value.

    Returns
    -------
    tuple of ndarray, shapes (S,)

    Raises
    ------
    ValueError
        If the group has no values, gae_lambda is outside [0, 1] or prior is negative.

    Notes
    -----
    With ``r_S = R``, ``r_k = 0`` before, potential ``U`` and ``U(terminal) = 0`` [1]_::

        delta_k = r_k + U(s_k) - U(s_{k-1})        k = 1..S, state s_k follows step k
        A_k     = sum_{l >= 0} lambda^l delta_{k+l}                                  [2]_

    so ``A_k = R - U(s_{k-1})`` at lambda 1. The potential is the PRM's value moved by a constant
    per trajectory, ``U(s) = V(s) - V(s_0) + b_i``, where::

        b_i = (prior V(s_0) + sum_{j != i} R_j) / (prior + G - 1)

    is the posterior mean of the task's success rate given the other trajectories. ``b_i`` does not
    depend on trajectory i's actions, so it adds no bias; it corrects a PRM that is off for the
    task or has fallen behind the policy, where ``R - V`` alone would have the wrong level. With
    prior 0 only *differences* of V matter, and a constant V gives `outcome_advantages`. On the
    enumerated process of the tests prior 4 is within 9 % of the smallest variance both for an
    exact PRM (where an infinite prior is best) and for one that is 0.3 too low.

    References
    ----------
    .. [1] Ng, Harada, Russell, Policy invariance under reward transformations, ICML 1999,
       theorem 1.
    .. [2] Schulman et al., Generalized advantage estimation, arXiv:1506.02438, equation 16.

    Examples
    --------
    >>> group = Group(
    ...     outcomes=np.array([1.0]), num_steps=(2,), values=(np.array([0.5, 0.25, 0.9]),)
    ... )
    >>> potential_advantages(group)
    (array([0.5 , 0.75]),)
    >>> potential_advantages(group, 0.0)
    (array([-0.25,  0.75]),)
    """
    if group.values is None:
        raise ValueError("potential advantages need the PRM's values of every prefix")
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"gae_lambda must be in [0, 1], not {gae_lambda}")
    if not prior >= 0:
        raise ValueError(f"prior must be >= 0, not {prior}")
    total = group.outcomes.sum()
    advantages = []
    for reward, values in zip(group.outcomes, group.values, strict=True):
        others, num_others = total - reward, len(group.outcomes) - 1
        shift = 0.0
        if num_others and np.isfinite(prior):
            shift = float((others - num_others * values[0]) / (prior + num_others))
        potential = values[:-1] + shift  # U(s_0) .. U(s_{S-1})
        deltas = np.append(potential[1:], reward) - potential if len(potential) else potential
        advantages.append(_discounted_sums(deltas, gae_lambda))
    return tuple(advantages)


def _discounted_sums(deltas_S: FloatArray, discount: float) -> FloatArray:
    """Return ``sum_{l >= 0} discount^l deltas[k + l]`` for every k."""
    sums_S = np.zeros_like(deltas_S)
    running = 0.0
    for k in range(len(deltas_S) - 1, -1, -1):
        running = float(deltas_S[k]) + discount * running
        sums_S[k] = running
    return sums_S


def scale_advantages(
    advantages: Sequence[FloatArray], *, reward_range: float = 1.0, tolerance: float = 0.02
) -> tuple[FloatArray, ...]:
    """Divide all advantages of a batch by one number, their root mean square over steps.

    Parameters
    ----------
    advantages : sequence of ndarray, shapes (S,)
        The whole batch of one optimizer step.
    reward_range : float, default=1.0
        Largest minus smallest possible outcome, > 0.
    tolerance : float, default=0.02
        The divisor is at least ``tolerance * reward_range``, so a batch in which nothing but PRM
        noise differs is not blown up to unit size.

    Returns
    -------
    tuple of ndarray, shapes (S,)

    Notes
    -----
    The standard deviation is taken about zero and nothing is subtracted: advantages are centred
    by their estimator, and a batch mean would make each step's baseline depend on its own later
    steps. One positive factor for the whole batch keeps the direction of its gradient.

    Examples
    --------
    >>> scale_advantages([np.array([0.3]), np.array([-0.3, 0.3])])
    (array([1.]), array([-1.,  1.]))
    >>> scale_advantages([np.array([1e-9])])[0] < 1e-6
    array([ True])
    """
    if reward_range <= 0 or tolerance <= 0:
        raise ValueError("reward_range and tolerance must be > 0")
    steps = np.concatenate([np.zeros(0), *advantages])
    size = float(np.sqrt(np.mean(steps**2))) if len(steps) else 0.0
    scale = max(size, tolerance * reward_range)
    return tuple(a / scale for a in advantages)


def has_outcome_variance(group: Group, *, tolerance: float = 1e-6) -> bool:
    """Tell whether outcomes differ within the group by more than ``tolerance`` of their range 1.

    Examples
    --------
    >>> has_outcome_variance(Group(outcomes=np.array([1.0, 1.0]), num_steps=(1, 1)))
    False
    """
    return bool(np.ptp(group.outcomes) > tolerance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """One way to compute advantages, and what is known about it."""

    function: AdvantageFunction
    needs_values: bool
    """Whether it reads the PRM's values (and takes a lambda)."""
    min_group: int
    """Fewest trajectories a group needs."""
    keeps_equal_outcomes: bool
    """Whether a group whose outcomes are all equal still carries signal."""
    unbiased: bool
    """Whether the gradient is unbiased at lambda 1 for *any* values."""

    def is_unbiased(self, gae_lambda: float) -> bool:
        """Whether the gradient is unbiased at this lambda whatever the PRM says."""
        return self.unbiased and gae_lambda == 1.0


ADVANTAGES: dict[str, Estimator] = {
    "outcome": Estimator(
        function=outcome_advantages,
        needs_values=False,
        min_group=2,
        keeps_equal_outcomes=False,
        unbiased=True,
    ),
    "potential": Estimator(
        function=potential_advantages,
        needs_values=True,
        min_group=1,
        keeps_equal_outcomes=True,
        unbiased=True,
    ),
}
"""Name -> estimator. A new one is a function above and a row here."""
