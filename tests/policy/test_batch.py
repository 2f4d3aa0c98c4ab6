"""Rows and micro-batches: ids kept exactly, observations never trained on."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.batch import collate, micro_batches, token_row
from trajectory.records import Sampling, Step, StopReason, Task, Trajectory

TASK = Task(task_id="t", domain="d", prompt="p", answer="1")
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)


def make(prompt, steps, trajectory_id="x"):
    return Trajectory(
        trajectory_id=trajectory_id,
        task=TASK,
        steps=tuple(
            Step(
                text="",
                token_ids=turn,
                logprobs=tuple(-0.1 * (i + 1) for i in range(len(turn))),
                observation_ids=observed,
            )
            for turn, observed in steps
        ),
        stop=StopReason.ANSWERED,
        outcome=1.0,
        prompt_ids=prompt,
    )


@st.composite
def trajectories(draw):
    number = draw(st.integers(1, 4))
    steps = [(draw(IDS), draw(IDS)) for _ in range(number)]
    if draw(st.booleans()):
        steps[-1] = (steps[-1][0], None)
    return make(draw(IDS), steps, trajectory_id=str(draw(st.integers(0, 10**6))))


def test_a_trajectory_is_flattened_as_worked_by_hand():
    row = token_row(make((1, 2), [((3, 4), (5, 6, 7)), ((8,), None)]), np.array([0.5, -1.0]))
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.action_mask.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True]
    assert row.advantages.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, -1.0]
    assert row.logprobs.tolist() == [0, 0, -0.1, -0.2, 0, 0, 0, -0.1]
    assert row.num_actions == 3


@given(trajectories())
def test_ids_are_reconstructed_exactly_and_actions_are_what_was_sampled(trajectory):
    row = token_row(trajectory, np.arange(1.0, trajectory.num_steps + 1))
    whole, sampled, observed = list(trajectory.prompt_ids), [], list(trajectory.prompt_ids)
    for step in trajectory.steps:
        whole += [*step.token_ids, *(step.observation_ids or ())]
        sampled += step.token_ids
        observed += step.observation_ids or ()
    assert row.input_ids.tolist() == whole
    assert row.input_ids[row.action_mask].tolist() == sampled
    assert row.input_ids[~row.action_mask].tolist() == observed
    assert not row.advantages[~row.action_mask].any()
    assert not row.logprobs[~row.action_mask].any()
    assert row.advantages[row.action_mask].all()


def test_an_injected_fault_is_context_not_action():
    plain = make((1,), [((2, 3), (4,)), ((5,), None)])
    faulty = dataclasses.replace(
        plain,
        steps=(
            dataclasses.replace(plain.steps[0], perturbation="wrong_operand", logprobs=None),
            plain.steps[1],
        ),
    )
    row = token_row(faulty, np.array([1.0, 2.0]))
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.action_mask.tolist() == [False, False, False, False, True]
    assert row.advantages.tolist() == [0, 0, 0, 0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": None}, "no prompt_ids"),
        ({"prompt_ids": ()}, "no prompt_ids"),
        ({"steps": (Step(text="a"), Step(text="b"))}, "no token_ids of step 1"),
        (
            {"steps": (Step(text="a", token_ids=(1,)), Step(text="b", token_ids=(1,)))},
            "no logprobs of step 1",
        ),
        (
            {
                "steps": (
                    Step(text="a", token_ids=(1,), logprobs=(0.0,)),
                    Step(text="b", token_ids=(1,), logprobs=(0.0,)),
                )
            },
            "no observation_ids of step 1",
        ),
    ],
)
def test_missing_ids_are_refused_by_name(change, message):
    trajectory = dataclasses.replace(make((1,), [((2,), (3,)), ((4,), None)]), **change)
    with pytest.raises(ValueError, match=message):
        token_row(trajectory, np.zeros(2))


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}])
def test_trajectories_from_another_distribution_than_the_policy_are_refused(sampling):
    trajectory = dataclasses.replace(make((1,), [((2,), None)]), sampling=Sampling(**sampling))
    with pytest.raises(ValueError, match="plain sampling"):
        token_row(trajectory, np.zeros(1))


def test_the_number_of_advantages_must_be_the_number_of_steps():
    with pytest.raises(ValueError, match="1 advantages for 2 steps"):
        token_row(make((1,), [((2,), (3,)), ((4,), None)]), np.zeros(1))


@given(st.lists(trajectories(), min_size=1, max_size=12), st.integers(1, 80))
def test_micro_batches_hold_every_row_once_within_the_budget(items, budget):
    rows = [token_row(t, np.zeros(t.num_steps)) for t in items]
    batches = micro_batches(rows, budget)
    assert sorted(id(r) for b in batches for r in b) == sorted(id(r) for r in rows)
    for batch in batches:
        padded = len(batch) * max(len(r.input_ids) for r in batch)
        assert padded <= budget or len(batch) == 1


def test_micro_batches_do_not_depend_on_the_order_of_rows():
    items = [make((1,) * n, [((2,), None)], trajectory_id=str(n)) for n in (3, 1, 5, 2, 4)]
    rows = [token_row(t, np.zeros(1)) for t in items]

    def names(order):
        return [[r.trajectory_id for r in b] for b in micro_batches([rows[i] for i in order], 10)]

    assert names([0, 1, 2, 3, 4]) == names([4, 2, 0, 1, 3]) == [["5"], ["4", "3"], ["2", "1"]]


def test_rows_are_padded_on_the_right_and_padding_is_in_no_mask():
    rows = [
        token_row(make((1, 2), [((3,), None)]), np.array([2.0])),
        token_row(make((4,), [((5,), None)]), np.array([3.0])),
    ]
    batch = collate(rows, pad_id=9, length=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9], [4, 5, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.action_mask.tolist() == [[False, False, True, False], [False, True, False, False]]
    assert batch.advantages.tolist() == [[0, 0, 2, 0], [0, 3, 0, 0]]
    assert batch.logprobs[0, 2].item() == pytest.approx(-0.1)


def test_a_micro_batch_needs_room_for_a_token():
    with pytest.raises(ValueError, match="max_tokens"):
        micro_batches([], 0)
