"""The same trajectories scored by the reward model and by everything it must beat.

An *arm* gives one score in [0, 1] per step 1..S of every trajectory. Beside the reward model stand

- ``position + length``: a logistic regression on step number and characters so far;
- ``execution ok``: one on whether this step's calls ran and the share that ran so far, where
  any call is known to have failed;
- ``shuffled labels``: a reward model trained on labels dealt out at random, where one is given.

Both regressions are fitted to the benchmark's own step labels, each problem from the others, so
they know the base rate of the very data; the reward model does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prm.baseline import cross_fit_logistic
from prm.metrics import Array, Items, make_items
from prm.score import Scorer
from trajectory.progress import progress
from trajectory.records import Step, Trajectory

PRM = "PRM"
POSITION = "position + length"
EXECUTION = "execution ok"
SHUFFLED = "shuffled labels"

_CHUNK = 64

StepScores = tuple[float, ...]
"""One score per step 1..S."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A trajectory and what the benchmark says of its steps."""

    trajectory: Trajectory
    targets: tuple[float | None, ...]
    """Of the steps 1..S: 1 right, 0 wrong, None where nothing is said."""

    @property
    def problem(self) -> str:
        """What the bootstrap draws."""
        return self.trajectory.task.task_id


def score_steps(scorer: Scorer, cases: Sequence[Case], *, calibrated: bool) -> list[StepScores]:
    """Score every step of every case; they must fit the model (see `Scorer.fits`)."""
    scores: list[StepScores] = []
    with progress("score", len(cases)) as bar:
        for start in range(0, len(cases), _CHUNK):
            chunk = [case.trajectory for case in cases[start : start + _CHUNK]]
            scores += [s.values[1:] for s in scorer.score(chunk, calibrated=calibrated)]
            bar.advance(len(chunk))
    return scores


def position_arm(cases: Sequence[Case]) -> list[StepScores]:
    """Score steps from their number and the characters so far."""

    def features(case: Case) -> Array:
        lengths = np.cumsum([_characters(step) for step in case.trajectory.steps])
        start = len(case.trajectory.task.prompt)
        return np.stack([np.arange(1, len(lengths) + 1), start + lengths], axis=1).astype(float)

    return _cross_fit(cases, [features(case) for case in cases])


def execution_arm(cases: Sequence[Case]) -> list[StepScores] | None:
    """Score steps from whether calls ran; None where no call failed, or the data do not say."""
    steps = (step for case in cases for step in case.trajectory.steps)
    if not any(o.error for step in steps for o in step.observations):
        return None

    def features(case: Case) -> Array:
        ok = [
            float(all(o.error is None for o in step.observations)) for step in case.trajectory.steps
        ]
        share = np.cumsum(ok) / np.arange(1, len(ok) + 1)
        return np.stack([np.asarray(ok), share], axis=1)

    return _cross_fit(cases, [features(case) for case in cases])


def _characters(step: Step) -> int:
    """Count a step's characters, observations included."""
    return len(step.text) + sum(len(o.content) for o in step.observations)


def _cross_fit(cases: Sequence[Case], features: Sequence[Array]) -> list[StepScores]:
    """Predict the targets of each problem from those of the others."""
    sizes = [len(case.targets) for case in cases]
    all_features = np.concatenate([f.reshape(-1, 2) for f in features])
    known = [target is not None for case in cases for target in case.targets]
    # Steps without a target are predicted too, with a weight that cannot move the fit.
    weights = np.where(known, 1.0, 1e-9)
    targets = np.asarray([t or 0.0 for case in cases for t in case.targets])
    groups = [case.problem for case in cases for _ in case.targets]
    guesses = cross_fit_logistic(all_features, targets, weights=weights, groups=groups)
    parts = np.split(guesses, np.cumsum(sizes)[:-1])
    return [tuple(part.tolist()) for part in parts]


def labelled_items(cases: Sequence[Case], scores: Sequence[StepScores]) -> Items:
    """Gather the steps with a target as items for AUROC, Brier and calibration error."""
    rows = [
        (score, target, case.problem)
        for case, values in zip(cases, scores, strict=True)
        for score, target in zip(values, case.targets, strict=True)
        if target is not None
    ]
    return make_items([s for s, _, _ in rows], [t for _, t, _ in rows], [p for _, _, p in rows])
