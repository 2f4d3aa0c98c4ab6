"""From groups of trajectories to rows and watched numbers."""

import numpy as np
import pytest

from policy.advantages import ADVANTAGES
from policy.credit import assign_credit, batch_metrics
from trajectory.records import Observation, Step, StepScores, StopReason, Task, ToolCall, Trajectory

TASK = Task(task_id="t", domain="d", prompt="p", answer="1")


def trajectory(name, outcome, *, steps=2, stop=StopReason.ANSWERED, tokens=3):
    call = ToolCall(name="calculator", arguments="{}")
    turns = [
        Step(
            text="",
            calls=(call,),
            observations=(Observation(content="1"),),
            token_ids=(5,) * tokens,
            logprobs=(-1.0,) * tokens,
            observation_ids=(7,),
        )
        for _ in range(steps - 1)
    ]
    if steps:
        turns.append(Step(text="", token_ids=(6,) * tokens, logprobs=(-1.0,) * tokens))
    return Trajectory(
        trajectory_id=name,
        task=TASK,
        steps=tuple(turns),
        stop=stop,
        outcome=outcome,
        prompt_ids=(1, 2),
    )


def scores_of(**values):
    return {
        name: StepScores(
            trajectory_id=name, checkpoint="c", values=v, kind="value", position="observation"
        )
        for name, v in values.items()
    }


def outcome_credit(groups):
    return assign_credit(groups, None, estimator=ADVANTAGES["outcome"], gae_lambda=1.0)


def test_groups_with_equal_outcomes_are_skipped_for_outcome_only():
    groups = [
        [trajectory("a", 1.0), trajectory("b", 0.0)],
        [trajectory("c", 1.0), trajectory("d", 1.0)],
    ]
    credit = outcome_credit(groups)
    assert [r.trajectory_id for r in credit.rows] == ["a", "b"]
    assert (credit.groups_used, credit.groups_skipped) == (1, 1)
    scores = scores_of(**dict.fromkeys("abcd", (0.5, 0.6, 0.7)))
    credit = assign_credit(groups, scores, estimator=ADVANTAGES["potential"], gae_lambda=1.0)
    assert [r.trajectory_id for r in credit.rows] == ["a", "b", "c", "d"]
    assert (credit.groups_used, credit.groups_skipped) == (2, 0)


def test_outcome_advantages_reach_the_action_tokens_scaled_to_unit_size():
    first, second = outcome_credit([[trajectory("a", 1.0), trajectory("b", 0.0)]]).rows
    assert first.advantages.tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert second.advantages.tolist() == [0, 0, -1, -1, -1, 0, -1, -1, -1]


def test_a_truncated_episode_counts_as_wrong_and_is_trained_on():
    cut = trajectory("b", None, stop=StopReason.MAX_STEPS)
    credit = outcome_credit([[trajectory("a", 1.0), cut]])
    assert credit.rows[1].advantages.min() == -1


def test_a_failed_episode_leaves_the_group_and_its_baseline():
    dead = trajectory("c", None, stop=StopReason.TOOL_FAILURE)
    with_dead = outcome_credit([[trajectory("a", 1.0), trajectory("b", 0.0), dead]])
    without = outcome_credit([[trajectory("a", 1.0), trajectory("b", 0.0)]])
    assert [r.trajectory_id for r in with_dead.rows] == ["a", "b"]
    for one, two in zip(with_dead.rows, without.rows, strict=True):
        assert np.array_equal(one.advantages, two.advantages)


def test_a_group_left_with_one_trajectory_is_skipped_for_outcome():
    dead = trajectory("b", None, stop=StopReason.ENGINE_FAILURE)
    credit = outcome_credit([[trajectory("a", 1.0), dead]])
    assert credit.rows == ()
    assert credit.groups_skipped == 1


def test_a_missing_score_is_an_error():
    groups = [[trajectory("a", 1.0), trajectory("b", 0.0)]]
    with pytest.raises(KeyError, match="b"):
        assign_credit(
            groups,
            scores_of(a=(0.5, 0.6, 0.7)),
            estimator=ADVANTAGES["potential"],
            gae_lambda=1.0,
        )


def test_an_episode_without_action_tokens_gives_a_baseline_but_no_row():
    empty = trajectory("b", None, steps=0, stop=StopReason.MAX_TOKENS)
    credit = outcome_credit([[trajectory("a", 1.0), empty]])
    assert [r.trajectory_id for r in credit.rows] == ["a"]
    assert credit.rows[0].advantages.max() == 1


def test_metrics_are_those_worked_by_hand():
    items = [
        trajectory("a", 1.0, steps=3, tokens=2),
        trajectory("b", None, steps=1, tokens=4, stop=StopReason.MAX_TOKENS),
        trajectory("c", None, stop=StopReason.TOOL_FAILURE),
    ]
    scores = scores_of(a=(0.5, 0.6, 0.8, 1.0), b=(0.5, 0.2))
    metrics = batch_metrics(items, scores)
    wanted = {
        "failed": 1,
        "outcome": 0.5,
        "tokens": 5,
        "steps": 2,
        "tool_calls": 1,
        "stop/answered": 1 / 3,
        "stop/max_tokens": 1 / 3,
        "stop/tool_failure": 1 / 3,
        "stop/malformed": 0,
        "prm_mean": (0.6 + 0.8 + 1.0 + 0.2) / 4,
        "prm_last": 0.6,
        "prm_gap": 0.1,
        "prm_auroc": 1.0,
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)


def test_auroc_is_left_out_where_all_outcomes_agree():
    scores = scores_of(a=(0.5, 0.6, 0.7))
    assert "prm_auroc" not in batch_metrics([trajectory("a", 1.0)], scores)
    assert "prm_mean" not in batch_metrics([trajectory("a", 1.0)], None)


def test_a_batch_of_failures_still_has_metrics():
    dead = trajectory("a", None, stop=StopReason.ENGINE_FAILURE)
    assert batch_metrics([dead], {})["failed"] == 1
