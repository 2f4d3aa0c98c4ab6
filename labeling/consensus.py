"""Combines rollouts, judge and execution oracle into one ternary verdict per step: pure functions.

Every source says -1, 0, +1 or nothing (None) of a step:

- *rollouts*: the sign of the step's progress, if its interval excludes 0 (`progress_signs`);
- *judge*: the majority of its votes (`labeling.judge.majority`);
- *oracle*: -1 a call failed, 0 no result was used, +1 some was (`labeling.oracle`).

Rollouts and judge also name a *first error*. For rollouts it is the step after which none of the
continuations succeeds any more (`lost_at`), for the judge the first step it calls bad
(`first_bad`). Step by step, the first error by rollouts reads as their *reach*: +1 before it, -1
at it, nothing after it.

The oracle is one-sided: a failed call speaks against a step, but a call that ran and was used may
still be the wrong call, so its +1 never outweighs another source where a policy says "unless".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from trajectory.records import LabelledTrajectory, StepLabels

Ternary = int | None
"""-1, 0, +1, or None for nothing said."""

NO_ERROR = 0
"""A first error of 0 says that there is none; steps count from 1."""

SOURCES = ("rollouts", "reach", "judge", "oracle")
"""Names in records and reports; ``rollouts`` and ``reach`` are two readings of the same counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the sources say of one trajectory with S steps."""

    rollouts: tuple[Ternary, ...]
    """Signs of progress, length S; never 0."""
    oracle: tuple[Ternary, ...]
    """Length S."""
    judge: tuple[Ternary, ...] | None
    """Length S; None if no judge was asked at all."""
    lost_at: int | None
    """First error by the rollouts: 1..S, `NO_ERROR`, or None if unknown."""

    def __post_init__(self) -> None:
        lengths = {len(self.rollouts), len(self.oracle)}
        lengths |= {len(self.judge)} if self.judge is not None else set()
        if len(lengths) != 1:
            raise ValueError(f"sources of different lengths {sorted(lengths)}")

    @property
    def judged_bad_at(self) -> int | None:
        """First error by the judge: 1..S, `NO_ERROR`, or None if unknown or not asked."""
        return None if self.judge is None else first_bad(self.judge)

    @property
    def reach(self) -> tuple[Ternary, ...]:
        """The first error by the rollouts as one answer per step, length S."""
        size = len(self.rollouts)
        if self.lost_at is None:
            return (None,) * size
        if self.lost_at == NO_ERROR:
            return (1,) * size
        return (*[1] * (self.lost_at - 1), -1, *[None] * (size - self.lost_at))

    def of_step(self, index: int) -> dict[str, Ternary]:
        """Return what rollouts (their sign), judge and oracle say of the step with this index."""
        judge = None if self.judge is None else self.judge[index]
        return {"rollouts": self.rollouts[index], "judge": judge, "oracle": self.oracle[index]}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConsensus:
    """One step: what the sources say, and what follows by the policy."""

    step: int
    """1..S."""
    rollouts: int | None
    """Sign of progress; never 0."""
    reach: int | None
    """+1 before the rollouts' first error, -1 at it."""
    judge: int | None
    oracle: int | None
    spoke: tuple[str, ...]
    """Those of `SOURCES` that said something."""
    verdict: int | None
    """-1, 0 or +1; None is no consensus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consensus:
    """One trajectory: a line of ``consensus.jsonl``."""

    trajectory_id: str
    policy: str
    steps: tuple[StepConsensus, ...]
    first_error_rollouts: int | None
    """1..S; 0 if there is none; None if unknown."""
    first_error_judge: int | None
    """The same by the judge; None also if it was not asked."""


def progress_signs(labels: StepLabels) -> tuple[Ternary, ...]:
    """Tell where the value rose or fell beyond its uncertainty.

    Parameters
    ----------
    labels : StepLabels
        Values with intervals for prefixes 0..S.

    Returns
    -------
    tuple of int or None, length S
        +1 up, -1 down, None undecided (or a value is unknown).

    Notes
    -----
    With values ``v``, ``w`` before and after the step and their intervals ``(l, u)``, ``(m, n)``
    the interval of ``d = w - v`` is
    ``d - sqrt((w - m)^2 + (u - v)^2) .. d + sqrt((n - w)^2 + (v - l)^2)``, which for Wilson
    intervals is Newcombe's method 10 [1]_ and holds for other intervals too [2]_. It has the
    coverage of the labels' intervals and takes the two prefixes' rollouts as independent. The end
    of a judged trajectory counts as K equal rollouts though its value is certain, so the last
    step is decided too rarely rather than too often.

    References
    ----------
    .. [1] Newcombe, Interval estimation for the difference between independent proportions,
       Statistics in Medicine 17, 1998, method 10.
    .. [2] Zou, Donner, Construction of confidence limits about effect measures, Statistics in
       Medicine 27, 2008.

    Examples
    --------
    >>> progress_signs(StepLabels(
    ...     trajectory_id="a", estimator="soft", values=(0.5, 0.9, 0.8, None),
    ...     low=(0.3, 0.8, 0.7, None), high=(0.7, 0.95, 0.9, None),
    ... ))
    (1, None, None)
    """
    prefixes = zip(labels.values, labels.low, labels.high, strict=True)
    return tuple(_sign(before, after) for before, after in pairwise(prefixes))


def _sign(before: tuple[float | None, ...], after: tuple[float | None, ...]) -> Ternary:
    """Decide one step from (value, low, high) before and after it."""
    (v, v_low, v_high), (w, w_low, w_high) = before, after
    if v is None or v_low is None or v_high is None:
        return None
    if w is None or w_low is None or w_high is None:
        return None
    if w - v > math.hypot(w - w_low, v_high - v):
        return 1
    return -1 if v - w > math.hypot(w_high - w, v - v_low) else None


def lost_at(successes: Sequence[int | None]) -> int | None:
    """Find the first error by rollouts: the step after which none succeeds, from there or later.

    Parameters
    ----------
    successes : sequence of int or None, length S + 1
        Right rollouts per prefix 0..S; None where no rollout was usable.

    Returns
    -------
    int or None
        The step, 1..S; `NO_ERROR` if rollouts from the last prefix succeed; None if no prefix has
        a success (the task is beyond the policy: no step can be blamed) or the count that would
        decide is unknown.

    Notes
    -----
    The hard label at threshold 0 [1]_, with what later prefixes show: a success from prefix ``u``
    is one from every ``t < u``, since the trajectory itself leads there, so agents that recover
    are not blamed. Few rollouts err: from a state with value .2 none of 8 succeeds in 17 % of
    cases.

    References
    ----------
    .. [1] Zhang et al., The Lessons of Developing Process Reward Models in Mathematical
       Reasoning, arXiv:2501.07301 (hard estimation, its threshold).

    Examples
    --------
    >>> lost_at((4, 0, 2, 0)), lost_at((4, 8)), lost_at((0, 0)), lost_at((4, None, 0))
    (3, 0, None, None)
    """
    alive = [prefix for prefix, count in enumerate(successes) if count]
    if not alive:
        return None
    if alive[-1] == len(successes) - 1:
        return NO_ERROR
    return None if successes[alive[-1] + 1] is None else alive[-1] + 1


def first_bad(verdicts: Sequence[Ternary]) -> int | None:
    """Find the first error by the judge.

    Returns
    -------
    int or None
        The first step, from 1, with verdict -1; `NO_ERROR` if there is none; None if a step
        before it (or any, if there is none) has no verdict.

    Examples
    --------
    >>> first_bad((1, -1, None)), first_bad((1, 0)), first_bad((None, -1))
    (2, 0, None)
    """
    for step, verdict in enumerate(verdicts, start=1):
        if verdict is None:
            return None
        if verdict == -1:
            return step
    return NO_ERROR


def unanimous(evidence: Evidence) -> tuple[Ternary, ...]:
    """Keep a trajectory only where rollouts and judge name the same first error.

    Parameters
    ----------
    evidence : Evidence
        Without a judge, the rollouts' first error stands alone.

    Returns
    -------
    tuple of int or None, length S
        All None if the first errors differ or one is unknown. Else -1 at the first error, None
        after it; before it (everywhere, if there is none) the lower of judge and oracle, or +1
        where neither speaks. There a step on which rollouts fell or a call failed is None: one
        source contradicts "no error here".

    Notes
    -----
    The filter of [1]_, which keeps about 40 % of the samples; the oracle is an addition.

    References
    ----------
    .. [1] Zhang et al., arXiv:2501.07301 (consensus filtering).

    Examples
    --------
    >>> both = Evidence(rollouts=(None, None, 1), oracle=(1, 1, None), judge=(1, -1, 1), lost_at=2)
    >>> unanimous(both), unanimous(replace(both, lost_at=0))
    ((1, -1, None), (None, None, None))
    """
    size = len(evidence.rollouts)
    error = evidence.lost_at
    if error is None or (evidence.judge is not None and evidence.judged_bad_at != error):
        return (None,) * size
    end = size if error == NO_ERROR else error - 1
    before = [_no_error_here(evidence.of_step(index)) for index in range(end)]
    at = [] if error == NO_ERROR else [-1]
    return (*before, *at, *[None] * (size - end - len(at)))


def _no_error_here(says: Mapping[str, Ternary]) -> Ternary:
    """Judge a step that no first error touches."""
    if -1 in says.values():
        return None
    others = [value for name in ("judge", "oracle") if (value := says[name]) is not None]
    return min(others, default=1)


def majority(evidence: Evidence) -> tuple[Ternary, ...]:
    """Keep a step if at least two sources speak and more than half of those say the same.

    Examples
    --------
    >>> majority(Evidence(rollouts=(1, None, None), oracle=(1, 1, None), judge=(-1, -1, 1),
    ...                   lost_at=None))
    (1, None, None)
    """
    verdicts: list[Ternary] = []
    for index in range(len(evidence.rollouts)):
        spoken = [v for v in evidence.of_step(index).values() if v is not None]
        value, count = Counter(spoken).most_common(1)[0] if spoken else (None, 0)
        verdicts.append(value if len(spoken) >= 2 and 2 * count > len(spoken) else None)
    return tuple(verdicts)


def rollouts_first(evidence: Evidence) -> tuple[Ternary, ...]:
    """Follow the rollouts where they decide, else the judge, else a failed call.

    Returns
    -------
    tuple of int or None, length S
        The sign of progress if it is decided. Else the judge's verdict, unless it calls good a
        step with a failed call (None). Else, without a verdict, -1 if a call failed, or None.

    Examples
    --------
    >>> rollouts_first(Evidence(rollouts=(1, None, None, None), oracle=(-1, -1, -1, 1),
    ...                         judge=(-1, 1, None, None), lost_at=None))
    (1, None, -1, None)
    """
    verdicts: list[Ternary] = []
    for index in range(len(evidence.rollouts)):
        says = evidence.of_step(index)
        failed = says["oracle"] == -1
        if says["rollouts"] is not None:
            verdicts.append(says["rollouts"])
        elif says["judge"] is not None:
            verdicts.append(None if failed and says["judge"] == 1 else says["judge"])
        else:
            verdicts.append(-1 if failed else None)
    return tuple(verdicts)


POLICIES: Mapping[str, Callable[[Evidence], tuple[Ternary, ...]]] = {
    "unanimous": unanimous,
    "majority": majority,
    "rollouts-first": rollouts_first,
}
"""How sources become a verdict, by name."""


def combine(trajectory_id: str, evidence: Evidence, policy: str) -> Consensus:
    """Apply a policy to one trajectory.

    Raises
    ------
    KeyError
        If the policy is unknown.
    """
    verdicts = POLICIES[policy](evidence)
    steps = []
    for index, verdict in enumerate(verdicts):
        says = evidence.of_step(index) | {"reach": evidence.reach[index]}
        spoke = tuple(name for name in SOURCES if says[name] is not None)
        steps.append(StepConsensus(step=index + 1, **says, spoke=spoke, verdict=verdict))
    return Consensus(
        trajectory_id=trajectory_id,
        policy=policy,
        steps=tuple(steps),
        first_error_rollouts=evidence.lost_at,
        first_error_judge=evidence.judged_bad_at,
    )


def filtered(row: LabelledTrajectory, consensus: Consensus) -> LabelledTrajectory:
    """Make the values unknown of prefixes whose step has no consensus.

    Parameters
    ----------
    row : LabelledTrajectory
        Labels by rollouts.
    consensus : Consensus
        Of the same trajectory.

    Returns
    -------
    LabelledTrajectory
        Estimator ``consensus``. Prefix 0 has no step and keeps its value; prefix ``t`` keeps it if
        step ``t`` has a verdict. Elsewhere the value is None and the counts are 0, so that a head
        trained on counts learns from the same prefixes as one trained on values.
    """
    kept = (True, *(step.verdict is not None for step in consensus.steps))
    labels, evidence = row.labels, row.evidence

    def known(values: tuple[float | None, ...]) -> tuple[float | None, ...]:
        return tuple(v if keep else None for v, keep in zip(values, kept, strict=True))

    counts: dict[str, Any] = {
        f.name: tuple(n if keep else 0 for n, keep in zip(value, kept, strict=True))
        for f in fields(evidence)
        if isinstance(value := getattr(evidence, f.name), tuple) and value
    }
    return LabelledTrajectory(
        trajectory=row.trajectory,
        evidence=replace(evidence, **counts),
        labels=replace(
            labels,
            estimator="consensus",
            values=known(labels.values),
            low=known(labels.low),
            high=known(labels.high),
        ),
    )
