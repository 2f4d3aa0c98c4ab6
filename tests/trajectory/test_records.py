"""The records refuse states that cannot be."""

from dataclasses import replace

import pytest

from tests.examples import make_labelled, make_scores, make_step, make_trajectory
from trajectory.records import (
    LabelledTrajectory,
    Sampling,
    Step,
    StepEvidence,
    StepLabels,
    StopReason,
    Task,
    ToolCall,
)


def make_evidence(**changes):
    fields = {
        "trajectory_id": "a", "rollouts": (4, 4), "correct": (1, 2), "truncated": (1, 0),
        "failed": (0, 2), "completer": "m", "sampling": Sampling(), "tokens": 9,
    }  # fmt: skip
    return StepEvidence(**(fields | changes))


def make_labels(**changes):
    fields = {
        "trajectory_id": "a", "estimator": "soft", "values": (0.5, None), "low": (0.1, None),
        "high": (0.9, None),
    }  # fmt: skip
    return StepLabels(**(fields | changes))


@pytest.mark.parametrize("reason", list(StopReason))
def test_every_stop_is_exactly_one_of_judged_truncated_failed(reason):
    assert reason.judged + reason.truncated + reason.failed == 1


def test_a_step_needs_one_observation_per_call():
    with pytest.raises(ValueError, match="one observation per call: 1 calls, 0 observations"):
        Step(text="x", calls=(ToolCall(name="c", arguments="{}"),))


def test_logprobs_must_align_with_token_ids():
    with pytest.raises(ValueError, match="2 for 3 token ids"):
        make_step(logprobs=(-1.0, -2.0))
    with pytest.raises(ValueError, match="1 for no token ids"):
        Step(text="x", logprobs=(-1.0,))


def test_a_truncated_trajectory_has_no_outcome():
    with pytest.raises(ValueError, match="'max_steps' does not go with outcome 0.0"):
        make_trajectory(stop=StopReason.MAX_STEPS, outcome=0.0)


def test_an_answered_trajectory_needs_an_outcome():
    with pytest.raises(ValueError, match="does not go with outcome None"):
        make_trajectory(outcome=None)


def test_an_outcome_is_a_probability():
    with pytest.raises(ValueError, match=r"outcome 1.5 is not in \[0, 1\]"):
        make_trajectory(outcome=1.5)


def test_ids_must_not_be_empty():
    with pytest.raises(ValueError, match="task_id"):
        Task(task_id="", domain="d", prompt="p", answer="a")
    with pytest.raises(ValueError, match="trajectory_id"):
        make_trajectory(trajectory_id="")


@pytest.mark.parametrize(
    "changes", [{"temperature": -1}, {"max_tokens": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_refuses_values_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Sampling(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"correct": (4, 4)}, {"failed": (-1, 0)}, {"truncated": (1,)}, {"rollouts": (4, 4, 4)}],
)
def test_evidence_refuses_impossible_counts(changes):
    with pytest.raises(ValueError, match="a: "):
        make_evidence(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": (0.5, 0.5)},
        {"values": (1.5, None)},
        {"low": (0.95, None)},
        {"high": (1.1, None)},
        {"low": (0.1,)},
    ],
)
def test_labels_refuse_bad_intervals(changes):
    with pytest.raises(ValueError, match="a: "):
        make_labels(**changes)


def test_ids_are_known_only_if_every_step_has_them():
    assert make_trajectory().has_ids
    assert not make_trajectory(prompt_ids=None).has_ids
    assert not make_trajectory(steps=(Step(text="x"),)).has_ids


def test_generated_tokens_are_those_of_the_turns():
    assert make_trajectory(num_steps=3).num_generated_tokens == 3 + 3 + 2


def test_labelled_parts_must_belong_together():
    row = make_labelled()
    other = replace(row.labels, trajectory_id="other")
    with pytest.raises(ValueError, match="its labels belong to 'other'"):
        LabelledTrajectory(trajectory=row.trajectory, evidence=row.evidence, labels=other)


def test_labelled_parts_must_cover_every_prefix():
    row = make_labelled(num_steps=2)
    shorter = make_labelled(num_steps=1).evidence
    with pytest.raises(ValueError, match="evidence for 2 prefixes, but 2 steps have 3"):
        LabelledTrajectory(trajectory=row.trajectory, evidence=shorter, labels=row.labels)


def test_scores_of_calls_end_with_the_score_of_their_step():
    scores = make_scores(make_trajectory(2))
    v = scores.values
    kept = replace(scores, calls=((0.9, v[1]), ()))
    assert kept.calls[0][-1] == kept.values[1]
    with pytest.raises(ValueError, match="step 1 scores 0.3.*, but its last call 0.9"):
        replace(scores, calls=((v[1], 0.9), ()))
    with pytest.raises(ValueError, match="the calls of 1 steps, but 3 prefixes"):
        replace(scores, calls=((v[1],),))
