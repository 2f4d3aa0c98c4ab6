"""What each benchmark reports: figures of one arm's step scores, with intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prm.benchmarks.arms import Case, StepScores, labelled_items
from prm.benchmarks.metrics import (
    Formula,
    confusion_columns,
    estimate_from_sums,
    first_error,
    last_is_lowest,
    prm_score,
    processbench_columns,
    processbench_f1,
    rate,
    right_f1,
)
from prm.metrics import Array, Estimate, estimate

THRESHOLD = 0.5
"""Scores below it call a step wrong."""

TUNING_SUBSET = "gsm8k"
"""ProcessBench's subset on which the other threshold is chosen, for scores whose 0.5 has no meaning
of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int
    seed: int

    def sums(self, columns_NM: Array, cases: Sequence[Case], formula: Formula) -> Estimate:
        """Estimate a metric of column sums over cases."""
        return estimate_from_sums(
            columns_NM,
            [case.problem for case in cases],
            formula,
            resamples=self.resamples,
            seed=self.seed,
        )


def common(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure what every benchmark reports: ranking, calibration, minima at the last step."""
    items = labelled_items(cases, scores)
    figures = {
        f"step_{name}": estimate(name, items, resamples=bootstrap.resamples, seed=bootstrap.seed)
        for name in ("auroc", "brier", "ece")
    }
    longer = [(c, s) for c, s in zip(cases, scores, strict=True) if len(s) > 1]
    columns = np.asarray([[float(last_is_lowest(s)), 1.0] for _, s in longer]).reshape(-1, 2)
    figures["lowest_is_last"] = bootstrap.sums(columns, [c for c, _ in longer], rate)
    return figures


def processbench(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure F1 at the fixed threshold and at the one tuned on GSM8K, by subset and on average.

    The tuned threshold is held fixed in the bootstrap.
    """
    labels = [_number(case, "label") for case in cases]
    subsets = [str(case.trajectory.meta["subset"]) for case in cases]
    names = list(dict.fromkeys(subsets))
    tuned = tune_threshold(cases, scores)
    figures: dict[str, Estimate] = {"tuned_threshold": Estimate(value=tuned)}
    if tuned is None:
        reason = f"no subset {TUNING_SUBSET} to tune on"
        figures["tuned_threshold"] = Estimate(value=None, reason=reason)
    for kind, threshold in (("fixed", THRESHOLD), ("tuned", tuned)):
        if threshold is None:
            continue
        columns = processbench_columns([first_error(s, threshold) for s in scores], labels)
        wide = np.zeros((len(cases), 4 * len(names)))
        for row, subset in enumerate(subsets):
            place = 4 * names.index(subset)
            wide[row, place : place + 4] = columns[row]
        figures[f"f1_{kind}"] = bootstrap.sums(wide, cases, processbench_f1)
        for name in names:
            chosen = [n for n, subset in enumerate(subsets) if subset == name]
            own = [cases[n] for n in chosen]
            part = columns[chosen]
            figures[f"{name}_f1_{kind}"] = bootstrap.sums(part, own, processbench_f1)
            figures[f"{name}_error_accuracy_{kind}"] = bootstrap.sums(part[:, :2], own, rate)
            figures[f"{name}_correct_accuracy_{kind}"] = bootstrap.sums(part[:, 2:], own, rate)
    return figures


def tune_threshold(cases: Sequence[Case], scores: Sequence[StepScores]) -> float | None:
    """Choose the threshold with the best F1 on the tuning subset; None without that subset.

    Candidates lie between all neighbouring lowest-so-far scores; of equally good ones the middle
    of the first best stretch is taken, so the choice does not hang on one score.
    """
    chosen = [n for n, c in enumerate(cases) if c.trajectory.meta["subset"] == TUNING_SUBSET]
    if not chosen:
        return None
    labels = [_number(cases[n], "label") for n in chosen]
    levels = np.unique(np.concatenate([np.asarray(scores[n]) for n in chosen]))
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    if len(edges) > 512:
        edges = np.quantile(edges, np.linspace(0, 1, 512))
    values = [
        processbench_f1(
            processbench_columns([first_error(scores[n], edge) for n in chosen], labels).sum(
                axis=0
            )[None]
        )[0]
        for edge in edges
    ]
    if np.all(np.isnan(values)):
        return None
    best = np.flatnonzero(values == np.nanmax(values))
    stretch = best[: int(np.argmax(np.diff(best, append=len(edges) + 2) > 1)) + 1]
    return float(edges[stretch[len(stretch) // 2]])


def agentprocessbench(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure StepAcc and FirstErrAcc.

    A step scored at least one half is called good (1), else harmful (-1). Neutral steps (0) can
    then never be met, so StepAcc is also given over the steps that are not neutral.

    References
    ----------
    AgentProcessBench, arXiv:2603.14465; RUCBM/AgentProcessBench ``eval/compare.py``: StepAcc is
    the share of all labelled steps whose label is met, FirstErrAcc the share of trajectories whose
    first step labelled -1 (or that there is none) is met.
    """
    steps, decided, firsts = [], [], []
    for case, values in zip(cases, scores, strict=True):
        called = [value >= THRESHOLD for value in values]
        hits = sum(t == float(c) for t, c in zip(case.targets, called, strict=True))
        steps.append([hits, len(values)])
        decided.append([hits, sum(t is not None for t in case.targets)])
        true = next((n for n, t in enumerate(case.targets) if t == 0.0), -1)
        firsts.append([first_error(values, THRESHOLD) == true, 1])
    return {
        "step_accuracy": bootstrap.sums(np.asarray(steps, float), cases, rate),
        "step_accuracy_without_neutral": bootstrap.sums(np.asarray(decided, float), cases, rate),
        "first_error_accuracy": bootstrap.sums(np.asarray(firsts, float), cases, rate),
    }


def prmbench(
    cases: Sequence[Case], scores: Sequence[StepScores], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Measure the PRMScore over all classes and of each.

    A step scored at least one half is called right, for every class; the benchmark's own threshold
    for redundancy (0.15) applies to models with a redundancy output of their own.
    """
    columns = np.stack(
        [
            confusion_columns([v >= THRESHOLD for v in values], [t == 1.0 for t in case.targets])
            for case, values in zip(cases, scores, strict=True)
        ]
    )
    figures = {"prm_score": bootstrap.sums(columns, cases, prm_score)}
    classes = [str(case.trajectory.meta["classification"]) for case in cases]
    for name in dict.fromkeys(classes):
        chosen = [n for n, c in enumerate(classes) if c == name]
        formula = right_f1 if name == "multi_solutions" else prm_score
        figures[f"{name}_prm_score"] = bootstrap.sums(
            columns[chosen], [cases[n] for n in chosen], formula
        )
    return figures


def _number(case: Case, name: str) -> int:
    """Return a whole number from a trajectory's meta."""
    value = case.trajectory.meta[name]
    assert isinstance(value, int)
    return value
