"""Rewards: how each ending is paid, and what makes scores unusable."""

import numpy as np
import pytest

from policy.rewards import outcome_reward, prefix_values
from trajectory.records import Step, StepScores, StopReason, Task, Trajectory

TASK = Task(task_id="t", domain="d", prompt="p", answer="1")


def trajectory(stop=StopReason.ANSWERED, outcome=1.0, steps=2):
    return Trajectory(
        trajectory_id="x",
        task=TASK,
        steps=tuple(Step(text=str(k)) for k in range(steps)),
        stop=stop,
        outcome=outcome,
    )


def scores(*values, trajectory_id="x"):
    return StepScores(
        trajectory_id=trajectory_id,
        checkpoint="c",
        values=values,
        kind="value",
        position="observation",
    )


@pytest.mark.parametrize(
    ("stop", "outcome", "reward"),
    [
        (StopReason.ANSWERED, 1.0, 1.0),
        (StopReason.ANSWERED, 0.25, 0.25),
        (StopReason.MALFORMED, 0.0, 0.0),
        (StopReason.MAX_STEPS, None, 0.0),
        (StopReason.MAX_TOKENS, None, 0.0),
        (StopReason.TOOL_FAILURE, None, None),
        (StopReason.ENGINE_FAILURE, None, None),
    ],
)
def test_every_ending_has_its_reward(stop, outcome, reward):
    assert outcome_reward(trajectory(stop, outcome)) == reward


def test_every_stop_reason_is_covered():
    for stop in StopReason:
        reward = outcome_reward(trajectory(stop, 0.0 if stop.judged else None))
        assert (reward is None) == stop.failed


def test_values_keep_the_order_of_prefixes():
    values = prefix_values(trajectory(), scores(0.5, 0.25, 1.0))
    assert values.tolist() == [0.5, 0.25, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (scores(0.5, 0.5, 0.5, trajectory_id="y"), "given for"),
        (scores(0.5, 0.5), "2 scores for 3 prefixes"),
        (scores(0.5, np.nan, 0.5), "not a number"),
        (scores(0.5, 0.5, 1.5), "not a number"),
    ],
)
def test_unusable_scores_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        prefix_values(trajectory(), given)
