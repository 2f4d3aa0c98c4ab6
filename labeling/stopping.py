"""The unbiased estimate of a success probability when sampling stopped early by a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from labeling.estimators import Estimate, smoothed


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingRule:
    """When the rollouts of one state go on, from nothing but their own results."""

    goes_on: Callable[[int, int], bool]
    """Asked with ``(n, c)`` after every batch."""
    ends: frozenset[int]
    """Numbers of rollouts at which it is asked."""
    _counts: dict[tuple[int, bool], tuple[int, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def sequences(self, n: int, *, first_right: bool) -> tuple[int, ...]:
        """Count the result sequences of ``n`` rollouts during which the rule never stopped.

        Parameters
        ----------
        n : int
            Rollouts, >= 1.
        first_right : bool
            Count only those that begin with a success.

        Returns
        -------
        tuple of int, length n + 1
            Entry ``c`` counts those with ``c`` successes.
        """
        known = self._counts.get((n, first_right))
        if known is not None:
            return known
        found: tuple[int, ...]
        if n == 1:
            found = (0, 1) if first_right else (1, 1)
        else:
            before = self.sequences(n - 1, first_right=first_right)
            asked = n - 1 in self.ends
            alive = [
                0 if asked and not self.goes_on(n - 1, c) else count
                for c, count in enumerate(before)
            ]
            found = tuple(a + b for a, b in zip([*alive, 0], [0, *alive], strict=True))
        self._counts[n, first_right] = found
        return found

    def leads_to(self, n: int, c: int) -> bool:
        """Tell whether sampling can have come to ``c`` right ones of ``n``, all of them usable."""
        return c in (0, n) or self.sequences(n, first_right=False)[c] > 0


def stopped(n: int, c: int, level: float, rule: StoppingRule) -> Estimate:
    """Estimate the success probability without the bias that early stopping brings to ``c / n``.

    Parameters
    ----------
    n : int
        Usable rollouts at the stop, >= 1.
    c : int
        Right ones, 0..n.
    level : float
        Coverage of the interval, in [0.5, 1).
    rule : StoppingRule
        Why sampling stopped there.

    Returns
    -------
    Estimate
        Unbiased over all runs of the rule. Where the rule stops at the first success it is noisy,
        mostly 0 or 1. The interval is that of `labeling.estimators.smoothed`, which the rule does
        not change (the likelihood of the counts is the same), widened to hold the value.

    Raises
    ------
    ValueError
        If the rule cannot lead to these counts (unless all results agree).

    Notes
    -----
    The first rollout alone is unbiased, and ``(n, c)`` is sufficient, so the mean of the first
    result given ``(n, c)`` is unbiased with less variance. All result sequences that lead to
    ``(n, c)`` are equally likely, so it is the share of those that begin with a success.

    References
    ----------
    .. [1] Girshick, Mosteller, Savage, Unbiased estimates for certain binomial sampling problems
       with applications, Annals of Mathematical Statistics 17(1), 1946, theorem 4.

    Examples
    --------
    With no early stop it is ``c / n``:

    >>> stopped(4, 1, 0.9, StoppingRule(goes_on=lambda n, c: True, ends=frozenset())).value
    0.25

    Stop at the first success, looking after every second rollout:

    >>> rule = StoppingRule(goes_on=lambda n, c: c == 0, ends=frozenset({2, 4}))
    >>> stopped(4, 1, 0.9, rule).value
    0.0
    """
    _, low, high = smoothed(n, c, level)
    paths = rule.sequences(n, first_right=False)[c]
    if c in (0, n):  # also the end of a trajectory, which no rule sampled
        value = c / n
    elif paths == 0:
        raise ValueError(f"the stopping rule cannot lead to n = {n}, c = {c}")
    else:
        value = rule.sequences(n, first_right=True)[c] / paths
    return Estimate(value, min(low, value), max(high, value))


def stopped_or_unknown(n: int, c: int, level: float, rule: StoppingRule) -> Estimate | None:
    """Estimate as `stopped`, or return None where broken tools kept the rule from being followed.

    A failed rollout takes its place in a batch and gives no result, so the rule may have been asked
    at other counts than its own.
    """
    return stopped(n, c, level, rule) if rule.leads_to(n, c) else None
