"""The disagreement report: where rollouts, judge and oracle part, and how far by chance.

Kappa comes from scikit-learn. Its interval is a percentile bootstrap that draws whole tasks, each
with all its trajectories: steps of one trajectory and trajectories of one task are not
independent.

Dimension letters: G tasks, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from labeling.consensus import SOURCES, Consensus, StepConsensus, Ternary
from trajectory.records import LabelledTrajectory

ANSWERS: tuple[Ternary, ...] = (-1, 0, 1, None)
"""What a source can say, in the order of rows and columns of a table."""

RESAMPLES = 2000
_EXCERPT = 200
"""Characters of a step's text in the list of contradictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kappa:
    """Cohen's kappa, or the reason why it (or its interval) is undefined."""

    value: float | None
    """1 is full agreement, 0 what two sources with these rates agree by chance."""
    low: float | None = None
    high: float | None = None
    """95 % percentile bootstrap interval over tasks."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """How two sources compare, over all steps."""

    first: str
    second: str
    table: tuple[tuple[int, ...], ...]
    """Steps; rows are what the first says, columns the second, each in the order of `ANSWERS`."""
    both_spoke: int
    """Steps on which both said something; kappa is over these."""
    same: int
    """Steps on which both said the same."""
    kappa: Kappa


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstErrors:
    """Whether rollouts and judge name the same first error, over trajectories."""

    both_known: int
    same: int
    """Among these, "no error" by both included."""
    same_without_error: int
    """Among these, "no error" by both."""
    rollouts_unknown: int
    """No prefix with a success, or a missing count."""
    judge_unknown: int
    """A step without a verdict before the first bad one, or not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction:
    """A step on which the sources part."""

    trajectory_id: str
    step: int
    rollouts: int | None
    reach: int | None
    judge: int | None
    oracle: int | None
    value_before: float | None
    value_after: float | None
    """By the rollouts."""
    text: str
    """Beginning of the turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """Content of ``disagreement.json``."""

    policy: str
    tasks: int
    trajectories: int
    steps: int
    consensus: Mapping[str, int]
    """Steps by verdict: -1, 0, +1, none."""
    sources: Mapping[str, Mapping[str, int]]
    """The same by source; ``none`` counts abstentions."""
    votes: Mapping[str, int]
    """Votes of the judge, and its abstentions by reason; empty without a judge."""
    first_errors: FirstErrors
    pairs: tuple[Pair, ...]
    contradictions: tuple[Contradiction, ...]
    """Widest first; see `contradictions`."""


def report(
    rows: Sequence[LabelledTrajectory],
    consensus: Sequence[Consensus],
    *,
    policy: str,
    votes: Mapping[str, int],
    examples: int,
    seed: int,
) -> Disagreement:
    """Compare the sources over all steps.

    Parameters
    ----------
    rows : sequence of LabelledTrajectory
    consensus : sequence of Consensus
        Of the same trajectories, in the same order.
    policy : str
        That made them.
    votes : mapping of str to int
        Counts of the judge's votes, passed on.
    examples : int
        Most contradictions listed, >= 0.
    seed : int
        Of the bootstrap.
    """
    steps = [step for one in consensus for step in one.steps]
    tasks = [row.trajectory.task.task_id for row in rows]
    of_step = [task for task, one in zip(tasks, consensus, strict=True) for _ in one.steps]
    return Disagreement(
        policy=policy,
        tasks=len(set(tasks)),
        trajectories=len(rows),
        steps=len(steps),
        consensus=_by_answer([step.verdict for step in steps]),
        sources={name: _by_answer([getattr(step, name) for step in steps]) for name in SOURCES},
        votes=votes,
        first_errors=first_errors(consensus),
        pairs=tuple(
            compare(steps, of_step, first=a, second=b, seed=seed)
            for a, b in combinations(SOURCES, 2)
            if (a, b) != ("rollouts", "reach")
        ),
        contradictions=contradictions(rows, consensus, most=examples),
    )


def name_of(answer: Ternary) -> str:
    """Return an answer as it is called in reports.

    Examples
    --------
    >>> [name_of(answer) for answer in ANSWERS]
    ['-1', '0', '+1', 'none']
    """
    return "none" if answer is None else f"{answer:+d}" if answer else "0"


def _by_answer(said: Sequence[Ternary]) -> dict[str, int]:
    """Count what was said."""
    counts = Counter(said)
    return {name_of(answer): counts[answer] for answer in ANSWERS}


def first_errors(consensus: Sequence[Consensus]) -> FirstErrors:
    """Compare the first errors that rollouts and judge name."""
    named = [(one.first_error_rollouts, one.first_error_judge) for one in consensus]
    known = [(a, b) for a, b in named if a is not None and b is not None]
    return FirstErrors(
        both_known=len(known),
        same=sum(a == b for a, b in known),
        same_without_error=sum(a == b == 0 for a, b in known),
        rollouts_unknown=sum(a is None for a, _ in named),
        judge_unknown=sum(b is None for _, b in named),
    )


def compare(
    steps: Sequence[StepConsensus], tasks: Sequence[str], *, first: str, second: str, seed: int
) -> Pair:
    """Tabulate two sources and measure their agreement beyond chance.

    Parameters
    ----------
    steps : sequence of StepConsensus
    tasks : sequence of str
        Task of each step.
    first, second : str
        Two of `SOURCES`.
    seed : int
        Of the bootstrap.
    """
    said = [(getattr(step, first), getattr(step, second)) for step in steps]
    counts = Counter(said)
    both = [
        (a, b, task)
        for (a, b), task in zip(said, tasks, strict=True)
        if a is not None and b is not None
    ]
    return Pair(
        first=first,
        second=second,
        table=tuple(tuple(counts[a, b] for b in ANSWERS) for a in ANSWERS),
        both_spoke=len(both),
        same=sum(a == b for a, b, _ in both),
        kappa=kappa([a for a, _, _ in both], [b for _, b, _ in both], [t for *_, t in both], seed),
    )


def kappa(first: Sequence[int], second: Sequence[int], tasks: Sequence[str], seed: int) -> Kappa:
    """Measure agreement beyond chance, with its interval over tasks.

    Parameters
    ----------
    first, second : sequence of int
        What two sources say of the same steps: -1, 0, +1.
    tasks : sequence of str
        Task of each step.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    Kappa
        Undefined where nothing is left to agree on by more than chance: no steps, or both sources
        always say the same one thing.

    Notes
    -----
    ``(p - e) / (1 - e)`` with ``p`` the share of steps on which both agree and ``e`` the share
    expected if each kept its rates and were independent. Not weighted: 0 and +1 differ as much as
    -1 and +1. If a source says only one thing, kappa is 0 however often the other agrees.

    References
    ----------
    .. [1] Cohen, A coefficient of agreement for nominal scales, Educational and Psychological
       Measurement 20(1), 1960.

    Examples
    --------
    >>> kappa([1, 1, -1, -1], [1, 1, -1, 1], ["a", "a", "b", "c"], 0).value
    0.5
    """
    if not first:
        return Kappa(value=None, reason="no step on which both spoke")
    if len({*first, *second}) == 1:
        return Kappa(value=None, reason="both always say the same")
    from sklearn.metrics import cohen_kappa_score

    value = float(cohen_kappa_score(first, second, labels=[-1, 0, 1]))
    names = {task: g for g, task in enumerate(dict.fromkeys(tasks))}
    if len(names) < 2:
        return Kappa(value=value, reason="one task only: no interval")
    tables_G = np.zeros((len(names), 3, 3))
    for a, b, task in zip(first, second, tasks, strict=True):
        tables_G[names[task], a + 1, b + 1] += 1
    draws_RG = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES
    )
    kappas_R = table_kappas(np.einsum("rg,gab->rab", draws_RG, tables_G))
    defined = kappas_R[~np.isnan(kappas_R)]
    if len(defined) < 0.9 * RESAMPLES:
        return Kappa(value=value, reason="undefined in over a tenth of the resamples")
    low, high = np.quantile(defined, [0.025, 0.975])
    return Kappa(value=value, low=float(low), high=float(high))


def table_kappas(tables_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute kappa of many tables of counts at once.

    Parameters
    ----------
    tables_R : array, shape (R, 3, 3)

    Returns
    -------
    array, shape (R,)
        NaN where it is undefined.
    """
    total_R = tables_R.sum(axis=(1, 2))
    rows, columns = tables_R.sum(axis=2), tables_R.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        same_R = np.trace(tables_R, axis1=1, axis2=2) / total_R
        chance_R = (rows * columns).sum(axis=1) / total_R**2
        kappas: NDArray[np.float64] = np.where(
            chance_R < 1, (same_R - chance_R) / (1 - chance_R), np.nan
        )
    return kappas


def contradictions(
    rows: Sequence[LabelledTrajectory], consensus: Sequence[Consensus], *, most: int
) -> tuple[Contradiction, ...]:
    """List the steps on which the sources part most.

    Returns
    -------
    tuple of Contradiction
        Ordered by the distance between the highest and the lowest of what was said (2 or 1), then
        by how much the value moved; steps without any difference are left out.
    """
    found: list[tuple[int, float, Contradiction]] = []
    for row, one in zip(rows, consensus, strict=True):
        for step in one.steps:
            said = [v for name in SOURCES if (v := getattr(step, name)) is not None]
            spread = max(said) - min(said) if said else 0
            if spread == 0:
                continue
            before, after = row.labels.values[step.step - 1 : step.step + 1]
            move = 0.0 if before is None or after is None else abs(after - before)
            shown = Contradiction(
                trajectory_id=one.trajectory_id,
                step=step.step,
                rollouts=step.rollouts,
                reach=step.reach,
                judge=step.judge,
                oracle=step.oracle,
                value_before=before,
                value_after=after,
                text=row.trajectory.steps[step.step - 1].text[:_EXCERPT],
            )
            found.append((spread, move, shown))
    found.sort(key=lambda item: item[:2], reverse=True)
    return tuple(shown for _, _, shown in found[:most])
