"""What is reported of agent runs and of candidate pools: ranking by turn, and choosing among them.

InterCode: every action's score against the eventual success of its run, over all actions, by turn
and by the model that acted; and the choice of one run per task. Pools: the choice of one solution
per problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

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

    def auroc(keep: Callable[[Case, int], bool]) -> Estimate:
        kept = [a for a in actions if keep(a[0], a[1])]
        items = make_items(
            [score for _, _, score in kept],
            [case.trajectory.outcome or 0.0 for case, _, _ in kept],
            [case.problem for case, _, _ in kept],
        )
        return estimate("auroc", items, resamples=bootstrap.resamples, seed=bootstrap.seed)

    figures = {
        "auroc": auroc(lambda c, t: True),
        "auroc_before_last": auroc(lambda c, t: t < c.trajectory.num_steps),
    }
    for turn in range(1, 1 + max((c.trajectory.num_steps for c in cases), default=0)):
        figures[f"turn_{turn}_auroc"] = auroc(lambda c, t, turn=turn: t == turn)  # type: ignore[misc]
    for policy in sorted({c.trajectory.policy for c in cases}):
        figures[f"{policy}_auroc"] = auroc(lambda c, t, p=policy: c.trajectory.policy == p)  # type: ignore[misc]
    return figures


def choose_runs(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure the success of the run chosen per task, for every aggregation."""
    return choose(cases, scores, run_answers(cases), bootstrap)


def _last_observation(case: Case) -> str | None:
    """Return what the run's last action gave, as its answer for votes; None for an error."""
    if not case.trajectory.steps:
        return None
    last = case.trajectory.steps[-1].observations
    ok = last and all(o.error is None for o in last)
    return canonical_answer(last[-1].content) if ok else None


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
        figures[f"best_{name}"] = _over_groups(
            groups,
            lambda g, v=values: by_score([v[n] for n in g], _outcomes(cases, g)),
            bootstrap,  # type: ignore[misc]
        )
        figures[f"weighted_vote_{name}"] = _over_groups(
            groups,
            lambda g, v=values: by_vote(  # type: ignore[misc]
                [answers[n] for n in g], _outcomes(cases, g), [v[n] for n in g]
            ),
            bootstrap,
        )
    return figures


def choose_without_scores(
    cases: Sequence[Case], answers: Sequence[str | None], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure the choices that need no reward model: random, majority vote, oracle."""
    groups = candidate_groups(cases)
    return {
        "random": _over_groups(groups, lambda g: at_random(_outcomes(cases, g)), bootstrap),
        "majority": _over_groups(
            groups, lambda g: by_vote([answers[n] for n in g], _outcomes(cases, g)), bootstrap
        ),
        "oracle": _over_groups(groups, lambda g: oracle(_outcomes(cases, g)), bootstrap),
    }


def run_answers(cases: Sequence[Case]) -> list[str | None]:
    """Return what runs vote with: the result of their last action, None for an error."""
    return [_last_observation(case) for case in cases]


def candidate_groups(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Group candidates by problem; problems with one candidate leave no choice."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, case in enumerate(cases):
        groups[case.problem].append(number)
    return {problem: members for problem, members in groups.items() if len(members) > 1}


def _outcomes(cases: Sequence[Case], group: Sequence[int]) -> list[float]:
    """Return the outcomes of some candidates."""
    return [cases[n].trajectory.outcome or 0.0 for n in group]


def _over_groups(
    groups: Mapping[str, Sequence[int]],
    chosen: Callable[[Sequence[int]], float],
    bootstrap: Bootstrap,
) -> Estimate:
    """Average a choice over problems."""
    columns = as_columns([chosen(group) for group in groups.values()])
    return estimate_from_sums(
        columns.reshape(-1, 2),
        list(groups),
        rate,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
    )
