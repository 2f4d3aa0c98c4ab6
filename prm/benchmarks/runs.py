"""What is reported of agent runs and of candidate pools: ranking by turn, and choosing among them.

InterCode: every action's score against the eventual success of its run, over all actions, by turn
and by the model that acted. Runs of one task, and solutions of one problem in a pool, also compete:
what is reported is the outcome of the one that is chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from prm.benchmarks.arms import Case, StepScores
from prm.benchmarks.metrics import estimate_from_sums, rate
from prm.benchmarks.pools import canonical_answer
from prm.benchmarks.selection import as_columns, at_random, by_score, by_vote, oracle
from prm.benchmarks.steps import Bootstrap
from prm.metrics import Estimate, estimate, make_items
from prm.score import AGGREGATIONS


def intercode(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure how well actions' scores rank runs by eventual success.

    ``auroc_before_last`` leaves the last action of every run out. InterCode ends most runs as soon
    as the task is solved, so that the last action tells more than any other.
    """
    actions = [
        (case, turn, score)
        for case, values in zip(cases, scores, strict=True)
        for turn, score in enumerate(values, start=1)
    ]

    def auroc(kept: Sequence[tuple[Case, int, float]]) -> Estimate:
        items = make_items(
            [score for _, _, score in kept],
            [case.trajectory.outcome or 0.0 for case, _, _ in kept],
            [case.problem for case, _, _ in kept],
        )
        return estimate("auroc", items, resamples=bootstrap.resamples, seed=bootstrap.seed)

    figures = {
        "auroc": auroc(actions),
        "auroc_before_last": auroc([a for a in actions if a[1] < a[0].trajectory.num_steps]),
    }
    for turn in sorted({turn for _, turn, _ in actions}):
        figures[f"turn_{turn}_auroc"] = auroc([a for a in actions if a[1] == turn])
    for policy in sorted({case.trajectory.policy for case in cases}):
        figures[f"{policy}_auroc"] = auroc([a for a in actions if a[0].trajectory.policy == policy])
    return figures


def run_answers(cases: Sequence[Case]) -> list[str | None]:
    """Return what runs vote with: the result of their last action, None for an error."""
    answers: list[str | None] = []
    for case in cases:
        last = case.trajectory.steps[-1].observations if case.trajectory.steps else ()
        ran = bool(last) and all(o.error is None for o in last)
        answers.append(canonical_answer(last[-1].content) if ran else None)
    return answers


def choose(
    cases: Sequence[Case],
    scores: Sequence[StepScores],
    answers: Sequence[str | None],
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    """Measure the outcome of the candidate chosen per problem: best score and weighted vote.

    Parameters
    ----------
    cases : sequence of Case
        Candidates; those of one problem compete. Only problems with at least two count.
    scores : sequence of tuple of float
        Of every candidate's steps; one without steps is scored 0.
    answers : sequence of str or None
        Of every candidate, equal answers as equal texts.
    bootstrap : Bootstrap
        How intervals are made.
    """
    groups = candidate_groups(cases)
    figures: dict[str, Estimate] = {}
    for name, aggregation in AGGREGATIONS.items():
        values = [aggregation(s) if s else 0.0 for s in scores]
        best, voted = [], []
        for group in groups.values():
            right, own = _outcomes(cases, group), [values[n] for n in group]
            best.append(by_score(own, right))
            voted.append(by_vote([answers[n] for n in group], right, own))
        figures[f"best_{name}"] = _average(groups, best, bootstrap)
        figures[f"weighted_vote_{name}"] = _average(groups, voted, bootstrap)
    return figures


def choose_without_scores(
    cases: Sequence[Case], answers: Sequence[str | None], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure the choices that need no reward model: random, majority vote, oracle."""
    groups = candidate_groups(cases)
    outcomes = [_outcomes(cases, group) for group in groups.values()]
    votes = [[answers[n] for n in group] for group in groups.values()]
    majority = [by_vote(a, right) for a, right in zip(votes, outcomes, strict=True)]
    return {
        "random": _average(groups, [at_random(right) for right in outcomes], bootstrap),
        "majority": _average(groups, majority, bootstrap),
        "oracle": _average(groups, [oracle(right) for right in outcomes], bootstrap),
    }


def candidate_groups(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Group candidates by problem; problems with one candidate leave no choice."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, case in enumerate(cases):
        groups[case.problem].append(number)
    return {problem: members for problem, members in groups.items() if len(members) > 1}


def _outcomes(cases: Sequence[Case], group: Sequence[int]) -> list[float]:
    """Return the outcomes of some candidates."""
    return [cases[n].trajectory.outcome or 0.0 for n in group]


def _average(problems: Collection[str], values: Sequence[float], bootstrap: Bootstrap) -> Estimate:
    """Average a choice's outcome over problems."""
    return estimate_from_sums(
        as_columns(values),
        list(problems),
        rate,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
    )
