"""Trajectories with the ratings of a public data set, and the way from ratings to labels.

A rating is a number in [0, 1] (how far the step is right), ``neutral``, or None where nobody said.
Neutral stays neutral here; only `to_labelled` turns it into a label, and only as it is told to:
OpenAI counts PRM800K's neutral steps as good, TRL's script as bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trajectory.errors import InputError
from trajectory.records import (
    LabelledTrajectory,
    Sampling,
    Step,
    StepEvidence,
    StepLabels,
    StopReason,
    Task,
    Trajectory,
)

Rating = float | Literal["neutral"] | None
"""Of one step: right (1.0) to wrong (0.0), neutral, or unknown (None)."""

Neutral = Literal["good", "bad", "mask"]
"""What neutral steps become: label 1, label 0, or no label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedTrajectory:
    """One row of a public data set: a trajectory, its ratings, and counts where it has them."""

    trajectory: Trajectory
    ratings: tuple[Rating, ...]
    """Of the steps 1..S."""
    rollouts: tuple[int, ...] = ()
    """Continuations known of each prefix 0..S; empty if the format has none."""
    correct: tuple[int, ...] = ()
    """How many of them ended right."""
    completer: str = ""
    """Who wrote those continuations."""
    source: str
    """Format it was read from."""
    place: str
    """File and line, for messages."""

    def __post_init__(self) -> None:
        steps = self.trajectory.num_steps
        if len(self.ratings) != steps:
            raise InputError(
                f"{self.place}: {len(self.ratings)} labels for {steps} steps: one per step is "
                "needed"
            )
        for number, rating in enumerate(self.ratings):
            if isinstance(rating, float) and not 0 <= rating <= 1:
                raise InputError(f"{self.place}: label {rating} of step {number} is not in [0, 1]")
        if len(self.rollouts) != len(self.correct) or len(self.rollouts) not in (0, steps + 1):
            raise InputError(
                f"{self.place}: {len(self.rollouts)} rollout counts and {len(self.correct)} "
                f"correct counts for {steps} steps: both need {steps + 1}, from the prompt on"
            )
        for prefix, (n, c) in enumerate(zip(self.rollouts, self.correct, strict=True)):
            if not 0 <= c <= n:
                raise InputError(
                    f"{self.place}: prefix {prefix} has {c} correct of {n} rollouts: correct must "
                    "lie between 0 and rollouts"
                )


def to_labelled(
    rows: Sequence[RatedTrajectory], *, neutral: Neutral | None = None
) -> list[LabelledTrajectory]:
    """Turn ratings into labels.

    Parameters
    ----------
    rows : sequence of RatedTrajectory
        Of one data set.
    neutral : {"good", "bad", "mask"}, optional
        What neutral steps become. None refuses them.

    Returns
    -------
    list of LabelledTrajectory
        In the same order. A step's label is its rating, or ``correct / rollouts`` where it has
        none but counts; prefix 0, the prompt, has a label only from counts. The interval of a
        rating is the rating itself.

    Raises
    ------
    InputError
        If a step is neutral and ``neutral`` is None, or no step is and ``neutral`` is given.
    """
    found = [row for row in rows if "neutral" in row.ratings]
    if found and neutral is None:
        count = sum(row.ratings.count("neutral") for row in found)
        raise InputError(
            f"{found[0].place}: {found[0].source} rates {count} steps of {len(found)} trajectories "
            "neutral; say what they mean with --neutral good (as OpenAI counts them), --neutral "
            "bad, or --neutral mask (no label)"
        )
    if neutral is not None and not found:
        raise InputError("--neutral is given, but no step is rated neutral: leave it out")
    meaning: dict[Neutral | None, float | None] = {"good": 1.0, "bad": 0.0, "mask": None}
    return [_labelled(row, meaning.get(neutral)) for row in rows]


def _labelled(row: RatedTrajectory, neutral: float | None) -> LabelledTrajectory:
    """Turn one row's ratings into labels."""
    name, size = row.trajectory.trajectory_id, row.trajectory.num_steps + 1
    zeros = (0,) * size
    rollouts, correct = row.rollouts or zeros, row.correct or zeros
    measured = [c / n if n else None for c, n in zip(correct, rollouts, strict=True)]
    rated = [None, *(neutral if r == "neutral" else r for r in row.ratings)]
    values = tuple(m if r is None else r for m, r in zip(measured, rated, strict=True))
    return LabelledTrajectory(
        trajectory=row.trajectory,
        evidence=StepEvidence(
            trajectory_id=name,
            rollouts=rollouts,
            correct=correct,
            truncated=zeros,
            failed=zeros,
            completer=row.completer,
            sampling=Sampling(),
            tokens=0,
        ),
        labels=StepLabels(
            trajectory_id=name, estimator=row.source, values=values, low=values, high=values
        ),
    )


def text_trajectory(
    *,
    trajectory_id: str,
    task: Task,
    steps: Sequence[str],
    policy: str = "",
    **meta: str | int | bool,
) -> Trajectory:
    """Make a trajectory of plain text steps without tools and without a verdict.

    Whether the final answer was right is kept in ``meta`` by the formats that say so, not as the
    outcome: an outcome would become the label of the last step, which is another question.
    """
    return Trajectory(
        trajectory_id=trajectory_id,
        task=task,
        steps=tuple(Step(text=text) for text in steps),
        stop=StopReason.MAX_STEPS,
        policy=policy,
        meta=meta,
    )


def step_text(step: Step) -> str:
    """Return a step as one text, observations after it, for formats that know no tools."""
    return "\n".join([step.text, *(o.content for o in step.observations)])
