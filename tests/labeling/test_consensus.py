"""Consensus by hand-computed examples, and the commands end to end."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.consensus import (
    NO_ERROR,
    POLICIES,
    Evidence,
    combine,
    filtered,
    first_bad,
    lost_at,
    majority,
    progress_signs,
    rollouts_first,
    unanimous,
)
from labeling.consensus_run import gather
from labeling.disagreement import ANSWERS
from labeling.estimators import label_steps
from tests.examples import labelled as any_labelled
from tests.examples import make_labelled
from trajectory.records import Sampling, StepEvidence, StepLabels

ternary = st.sampled_from(ANSWERS)


def labels_of(*values):
    """Labels from (value, low, high) or None per prefix."""
    parts = list(zip(*[v or (None,) * 3 for v in values], strict=True))
    return StepLabels(
        trajectory_id="a", estimator="soft", values=parts[0], low=parts[1], high=parts[2]
    )


def says(rollouts, judge, oracle, lost=None):
    return Evidence(rollouts=rollouts, judge=judge, oracle=oracle, lost_at=lost)


@st.composite
def evidences(draw, judged=None):
    size = draw(st.integers(0, 5))
    row = st.tuples(*[ternary] * size)
    judged = draw(st.booleans()) if judged is None else judged
    return Evidence(
        rollouts=draw(st.tuples(*[st.sampled_from([-1, 1, None])] * size)),
        judge=draw(row) if judged else None,
        oracle=draw(row),
        lost_at=draw(st.sampled_from([None, *range(size + 1)])),
    )


# Rollouts


def test_progress_is_signed_only_beyond_its_uncertainty():
    """By Newcombe's formula: .4 beyond hypot(.05, .2) = .206; .2 within hypot(.1, .2) = .224."""
    up = labels_of((0.5, 0.3, 0.7), (0.9, 0.85, 0.95))
    assert progress_signs(up) == (1,)
    assert progress_signs(labels_of((0.9, 0.85, 0.95), (0.5, 0.3, 0.7))) == (-1,)
    assert progress_signs(labels_of((0.5, 0.3, 0.7), (0.7, 0.6, 0.8))) == (None,)
    assert progress_signs(labels_of((0.5, 0.3, 0.7), None, (0.9, 0.8, 1.0))) == (None, None)


def test_four_rollouts_decide_only_between_all_and_none():
    """Wilson at .9: 0/4 is (0, .40), 4/4 (.60, 1), 2/4 (.18, .82)."""
    counts = StepEvidence(
        trajectory_id="a",
        rollouts=(4,) * 4,
        correct=(0, 4, 2, 0),
        truncated=(0,) * 4,
        failed=(0,) * 4,
        completer="m",
        sampling=Sampling(),
        tokens=0,
    )
    assert progress_signs(label_steps(counts, "soft", level=0.9)) == (1, None, None)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_swapping_before_and_after_flips_the_sign(n, m, data):
    counts = StepEvidence(
        trajectory_id="a",
        rollouts=(n, m, n),
        correct=(
            c := data.draw(st.integers(0, n)),
            data.draw(st.integers(0, m)),
            c,
        ),
        truncated=(0,) * 3,
        failed=(0,) * 3,
        completer="m",
        sampling=Sampling(),
        tokens=0,
    )
    there, back = progress_signs(label_steps(counts, "smoothed"))
    assert there == (None if back is None else -back)


@pytest.mark.parametrize(
    ("successes", "error"),
    [
        ((4, 3, 4), NO_ERROR),
        ((4, 3, 0), 2),
        ((4, 0, 0), 1),
        ((4, 0, 1, 0), 3),
        ((4, 0, 1), NO_ERROR),
        ((0, 0, 4), NO_ERROR),
        ((0, 0, 0), None),
        ((4, None, 0), None),
        ((4, None, 2, 0), 3),
        ((None, 0), None),
        ((4,), NO_ERROR),
    ],
)
def test_the_first_error_is_the_step_after_which_nothing_succeeds(successes, error):
    assert lost_at(successes) == error


@pytest.mark.parametrize(
    ("verdicts", "error"),
    [((1, 0, 1), 0), ((1, -1, -1), 2), ((1, None, -1), None), ((-1, None), 1), ((), 0)],
)
def test_the_judges_first_error_needs_every_verdict_before_it(verdicts, error):
    assert first_bad(verdicts) == error


# Policies


@pytest.mark.parametrize(
    ("evidence", "verdicts"),
    [
        # Both name step 2: what follows is unknown.
        (says((None, -1, None), (1, -1, 1), (1, 1, None), 2), (1, -1, None)),
        # Neither names one: the lower of judge and oracle.
        (says((1, None, None), (1, 1, 0), (1, 0, None), 0), (1, 0, 0)),
        # They differ: nothing is kept.
        (says((None, -1, None), (1, 1, -1), (1, 1, None), 2), (None,) * 3),
        (says((None, None), (1, 1), (1, None), 2), (None,) * 2),
        # One is unknown.
        (says((None, None), (1, None), (1, None), 0), (None,) * 2),
        (says((None, None), (1, 1), (1, None), None), (None,) * 2),
        # A failed call, or a fall that leaves hope, contradicts "no error here".
        (says((None, -1, None), (1, 1, 1), (-1, 1, None), 0), (None, None, 1)),
        # A call that ran does not save the step both call the first error.
        (says((None,), (-1,), (1,), 1), (-1,)),
        # No judge was asked.
        (says((None, -1, None), None, (0, 1, None), 2), (0, -1, None)),
        (says((None, None), None, (1, None), 0), (1, 1)),
    ],
)
def test_unanimous_by_hand(evidence, verdicts):
    assert unanimous(evidence) == verdicts


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ((1, 1, -1), 1),
        ((None, 1, 1), 1),
        ((None, 0, 0), 0),
        ((-1, -1, None), -1),
        ((1, -1, None), None),
        ((None, -1, 1), None),
        ((1, -1, 0), None),
        ((1, None, None), None),
        ((None, None, None), None),
    ],
)
def test_majority_by_hand(said, verdict):
    rollouts, judged, oracle = said
    assert majority(says((rollouts,), (judged,), (oracle,))) == (verdict,)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ((1, -1, -1), 1),
        ((-1, 1, 1), -1),
        ((None, 1, 1), 1),
        ((None, 1, None), 1),
        ((None, 1, -1), None),
        ((None, -1, 1), -1),
        ((None, 0, -1), 0),
        ((None, None, -1), -1),
        ((None, None, 1), None),
        ((None, None, None), None),
    ],
)
def test_rollouts_first_by_hand(said, verdict):
    rollouts, judged, oracle = said
    assert rollouts_first(says((rollouts,), (judged,), (oracle,))) == (verdict,)


@pytest.mark.parametrize("policy", POLICIES)
@given(evidence=evidences())
def test_every_verdict_was_said_by_a_source_or_is_no_error(policy, evidence):
    found = combine("a", evidence, policy)
    for index, step in enumerate(found.steps):
        said = evidence.of_step(index) | {"reach": evidence.reach[index]}
        assert set(step.spoke) == {name for name, value in said.items() if value is not None}
        assert step.verdict is None or step.verdict in [said[name] for name in step.spoke]


@pytest.mark.parametrize("policy", POLICIES)
@given(evidence=evidences())
def test_silent_sources_give_no_verdict(policy, evidence):
    nothing = (None,) * len(evidence.rollouts)
    silent = Evidence(rollouts=nothing, judge=nothing, oracle=nothing, lost_at=evidence.lost_at)
    assert POLICIES[policy](silent) == nothing


def test_reach_is_the_first_error_step_by_step():
    nothing = (None,) * 3
    assert says(nothing, None, nothing, 0).reach == (1, 1, 1)
    assert says(nothing, None, nothing, 2).reach == (1, -1, None)
    assert says(nothing, None, nothing, None).reach == nothing


@given(evidences(judged=True))
def test_unanimous_keeps_nothing_after_the_first_error(evidence):
    verdicts = unanimous(evidence)
    if -1 in verdicts:
        error = verdicts.index(-1) + 1
        assert error == evidence.lost_at == evidence.judged_bad_at
        assert set(verdicts[error:]) <= {None}


def test_sources_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="different lengths"):
        says((None,), (1, 1), (None,))


# Labels


def test_labels_keep_the_rollout_value_or_are_unknown():
    row = make_labelled(3)
    labels = replace(
        row.labels,
        values=(0.5, 0.75, 0.0, 0.0),
        low=(0.2, 0.5, 0.0, 0.0),
        high=(0.8, 0.9, 0.3, 0.3),
    )
    evidence = replace(row.evidence, correct=(2, 3, 0, 0), failed=(0,) * 4)
    row = replace(row, labels=labels, evidence=evidence)
    both = says((None,) * 3, (1, -1, 1), (None,) * 3, lost=2)
    kept = filtered(row, combine(row.trajectory.trajectory_id, both, "unanimous"))
    assert kept.labels.estimator == "consensus"
    assert kept.labels.values == (0.5, 0.75, 0.0, None)
    assert kept.labels.low == (0.2, 0.5, 0.0, None)
    assert kept.labels.high == (0.8, 0.9, 0.3, None)
    assert kept.evidence.rollouts == (4, 4, 4, 0)
    assert kept.evidence.correct == (2, 3, 0, 0)
    assert kept.trajectory == row.trajectory


@given(any_labelled(), st.sampled_from(list(POLICIES)))
def test_no_value_is_invented(row, policy):
    one = combine(row.trajectory.trajectory_id, gather(row, None), policy)
    kept = filtered(row, one)
    assert kept.labels.values[0] == row.labels.values[0]
    for step in one.steps:
        t = step.step
        expected = None if step.verdict is None else row.labels.values[t]
        assert kept.labels.values[t] == expected
        counts = row.evidence.rollouts[t] if step.verdict is not None else 0
        assert kept.evidence.rollouts[t] == counts
