"""What a trajectory is worth: its verified outcome, and the PRM's value of every prefix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trajectory.records import StepScores, Trajectory


def outcome_reward(trajectory: Trajectory) -> float | None:
    """Return the verified reward of one episode, or None where there is none to give.

    Parameters
    ----------
    trajectory : Trajectory
        A finished episode.

    Returns
    -------
    float in [0, 1] or None
        The checker's verdict; 0.0 for an episode cut off by a limit; None where broken
        infrastructure ended it: such an episode leaves the batch and is counted.

    Notes
    -----
    In labelling a truncated episode is *unknown*. In RL the step and token limits are part of the
    task the policy is optimized for, so not finishing within them earns what a wrong answer earns.

    Examples
    --------
    >>> from trajectory.records import StopReason, Task
    >>> task = Task(task_id="t", domain="d", prompt="1 + 1?", answer="2")
    >>> def ended(stop, outcome=None):
    ...     return Trajectory(trajectory_id="x", task=task, steps=(), stop=stop, outcome=outcome)
    >>> outcome_reward(ended(StopReason.ANSWERED, 1.0))
    1.0
    >>> outcome_reward(ended(StopReason.MAX_STEPS))
    0.0
    >>> outcome_reward(ended(StopReason.TOOL_FAILURE)) is None
    True
    """
    if trajectory.stop.failed:
        return None
    if trajectory.stop.truncated:
        return 0.0
    return trajectory.outcome


def prefix_values(trajectory: Trajectory, scores: StepScores) -> NDArray[np.float64]:
    """Return the PRM's values of all prefixes of one trajectory.

    Parameters
    ----------
    trajectory : Trajectory
        The trajectory that was scored, S steps.
    scores : StepScores
        Its scores.

    Returns
    -------
    ndarray, shape (S + 1,)
        Value of prefix 0..S in [0, 1].

    Raises
    ------
    ValueError
        If the scores belong to another trajectory, do not cover every prefix, or hold a number
        outside [0, 1]: a missing score is an error, never a zero.
    """
    if scores.trajectory_id != trajectory.trajectory_id:
        raise ValueError(
            f"scores of {scores.trajectory_id!r} given for {trajectory.trajectory_id!r}"
        )
    if len(scores.values) != trajectory.num_steps + 1:
        raise ValueError(
            f"{trajectory.trajectory_id}: {len(scores.values)} scores for "
            f"{trajectory.num_steps + 1} prefixes"
        )
    values = np.asarray(scores.values, dtype=np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"{trajectory.trajectory_id}: a score is not a number in [0, 1]")
    return values
