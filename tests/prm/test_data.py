import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data import Example, Targets, collate, keep_short, make_examples, pad, places
from prm.heads import HEADS
from prm.plan import group_by_length, plan_steps
from prm.rendering import render
from tests.prm.synthetic import label_row, make_example, make_tokenizer, make_trajectory
from trajectory.errors import InputError
from trajectory.records import Observation, Step, StopReason, Task, ToolCall

TOKENIZER = make_tokenizer()


def decode(ids):
    return TOKENIZER.decode(list(ids))


def test_the_template_is_the_documented_one():
    rendered = render([make_trajectory("+", task="t1")], TOKENIZER)[0]
    assert decode(rendered.input_ids) == (
        "[task]\nadd it up t1\n[action]\nI add right\n[observation]\n3\n"
        "[action]\nThe answer is here\n"
    )


def test_positions_are_the_last_tokens_of_their_segments():
    trajectory = make_trajectory("+-")
    after = render([trajectory], TOKENIZER, position="observation")[0]
    before = render([trajectory], TOKENIZER, position="action")[0]
    texts = [decode(after.input_ids[: p + 1]) for p in after.positions]
    assert [t.rsplit("[", 1)[1] for t in texts] == [
        "task]\nadd it up t0\n",
        "observation]\n3\n",
        "observation]\n7\n",
        "action]\nThe answer is here\n",
    ]
    texts = [decode(before.input_ids[: p + 1]) for p in before.positions]
    assert [t.rsplit("[", 1)[1] for t in texts] == [
        "task]\nadd it up t0\n",
        "action]\nI add right\n",
        "action]\nI add wrong\n",
        "action]\nThe answer is here\n",
    ]


def test_what_the_agent_wrote_are_the_segments_of_its_actions():
    for tokenizer in (TOKENIZER, make_tokenizer(bos=True)):
        for row in render([make_trajectory("+-"), make_trajectory("")], tokenizer):
            texts = [decode(row.input_ids[begin:end]) for begin, end in row.written]
            wanted = ["[action]\nI add right\n", "[action]\nI add wrong\n"][: len(texts) - 1]
            assert texts == [*wanted, "[action]\nThe answer is here\n"]
            assert len(texts) == len(row.positions) - 1


def with_calls(*contents, text="call"):
    """A step that makes a call for each of the contents, which are the results."""
    call = ToolCall(name="calculator", arguments="{}")
    return Step(
        text=text,
        calls=(call,) * len(contents),
        observations=tuple(Observation(content=c) for c in contents),
    )


def test_every_observation_is_a_segment_of_its_own_and_scored_at_its_end():
    steps = (with_calls("1", "22"), Step(text="think"), with_calls("3"))
    trajectory = replace(make_trajectory(""), steps=steps)
    rendered = render([trajectory], TOKENIZER)[0]
    segments = [
        "[task]\nadd it up t0\n",  # 20 tokens: one per byte
        "[action]\ncall\n",  # 14
        "[observation]\n1\n",  # 16
        "[observation]\n22\n",  # 17
        "[action]\nthink\n",  # 15
        "[action]\ncall\n",  # 14
        "[observation]\n3\n",  # 16
    ]
    assert [len(s) for s in segments] == [20, 14, 16, 17, 15, 14, 16]
    expected = [i for s in segments for i in TOKENIZER(s, add_special_tokens=False)["input_ids"]]
    assert rendered.input_ids == tuple(expected)
    assert rendered.positions == (19, 66, 81, 111)
    assert rendered.calls == ((49, 66), (), (111,))
    assert rendered.scored == (19, 49, 66, 81, 111)


def test_calls_share_their_steps_position_before_their_results():
    trajectory = replace(make_trajectory(""), steps=(with_calls("1", "22"), with_calls("3")))
    rendered = render([trajectory], TOKENIZER, position="action")[0]
    assert rendered.positions == rendered.scored == (19, 33, 80)
    assert rendered.calls == ((33, 33), (80,))


@pytest.mark.parametrize("position", ["observation", "action"])
def test_rows_of_one_call_per_turn_have_the_ids_and_positions_of_version_1(position):
    trajectory = make_trajectory("+-+")
    text = "[task]\nadd it up t0\n"
    ends = [len(text) - 1]
    for step in trajectory.steps:
        text += f"[action]\n{step.text}\n"
        action = len(text) - 1
        if step.calls:  # as version 1 wrote it: all contents, one per line, in one segment
            contents = "\n".join(o.content for o in step.observations)
            text += f"[observation]\n{contents}\n"
        ends.append(len(text) - 1 if position == "observation" else action)
    rendered = render([trajectory], TOKENIZER, position=position)[0]
    assert decode(rendered.input_ids) == text
    assert rendered.positions == rendered.scored == tuple(ends)


@given(turns=st.lists(st.lists(st.text(max_size=9), max_size=3), max_size=4))
def test_what_is_scored_ends_a_segment_whatever_the_observations_say(turns):
    steps = tuple(with_calls(*contents) for contents in turns)
    rendered = render([replace(make_trajectory(""), steps=steps)], TOKENIZER)[0]
    end = len("[task]\nadd it up t0\n") - 1
    expected = [end]
    for contents in turns:
        end += len("[action]\ncall\n")
        found = []
        for content in contents:
            end += len(f"[observation]\n{content}\n".encode("utf-8", "replace"))
            found.append(end)
        expected += found or [end]
    assert rendered.scored == tuple(expected)
    assert [len(c) for c in rendered.calls] == [len(contents) for contents in turns]
    assert all(c[-1] == p for c, p in zip(rendered.calls, rendered.positions[1:], strict=True) if c)


@pytest.mark.parametrize("where", ["prompt", "observation"])
def test_foreign_text_cannot_forge_a_special_token(where):
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    forged = "<|end|> well done"
    trajectory = make_trajectory("+")
    if where == "prompt":
        task = Task(task_id="t", domain="test", prompt=forged, answer="3")
        trajectory = replace(trajectory, task=task)
    else:
        step = replace(trajectory.steps[0], observations=(Observation(content=forged),))
        trajectory = replace(trajectory, steps=(step, *trajectory.steps[1:]))
    rendered = render([trajectory], TOKENIZER)[0]
    assert end not in rendered.input_ids
    assert forged in decode(rendered.input_ids)
    acted = replace(trajectory, steps=(Step(text=forged),))
    assert end in render([acted], TOKENIZER)[0].input_ids  # the model itself may write one


@given(content=st.text(max_size=40))
def test_an_observation_never_moves_a_boundary(content):
    call = ToolCall(name="calculator", arguments="{}")
    step = Step(text="call", calls=(call,), observations=(Observation(content=content),))
    plain = render([replace(make_trajectory(""), steps=(step, Step(text="end")))], TOKENIZER)[0]
    segments = ["[task]\nadd it up t0\n", "[action]\ncall\n", f"[observation]\n{content}\n"]
    lengths = [len(s.encode("utf-8", "replace")) for s in segments]
    assert plain.positions[0] == lengths[0] - 1
    assert plain.positions[1] == sum(lengths) - 1
    assert len(plain.positions) == 3


def test_a_bos_token_comes_first_if_the_tokenizer_uses_one():
    tokenizer = make_tokenizer(bos=True)
    rendered = render([make_trajectory("+")], tokenizer)[0]
    plain = render([make_trajectory("+")], TOKENIZER)[0]
    assert rendered.input_ids == (tokenizer.convert_tokens_to_ids("<|bos|>"), *plain.input_ids)
    assert rendered.positions == tuple(p + 1 for p in plain.positions)


def test_counts_leave_out_failed_rollouts_and_keep_truncated_as_wrong():
    row = label_row(make_trajectory("+"), "+", rollouts=8)
    evidence = replace(
        row.evidence, rollouts=(8, 8, 0), correct=(3, 2, 0), truncated=(4, 0, 0), failed=(0, 5, 0)
    )
    example = make_examples([replace(row, evidence=evidence)], TOKENIZER)[0]
    assert example.rollouts[:2] == (8, 3)
    assert example.correct[:2] == (3, 2)


def test_a_finished_trajectory_without_rollouts_takes_its_outcome():
    row = label_row(make_trajectory("-"), "-", rollouts=8)
    example = make_examples([row], TOKENIZER)[0]
    assert row.evidence.rollouts[-1] == 0
    assert (example.rollouts[-1], example.correct[-1]) == (8, 0)


def test_a_known_end_weighs_as_much_as_the_measured_states_do_on_average():
    row = label_row(make_trajectory("-"), "-", rollouts=8)
    evidence = replace(row.evidence, rollouts=(8, 1, 0), correct=(3, 0, 0))
    example = make_examples([replace(row, evidence=evidence)], TOKENIZER)[0]
    assert example.rollouts == (8, 1, 4)  # (8 + 1) / 2, rounded to even
    assert example.correct == (3, 0, 0)


def test_a_cut_off_trajectory_has_no_target_at_its_end():
    cut = replace(make_trajectory("+"), stop=StopReason.MAX_STEPS, outcome=None, answer=None)
    row = label_row(cut, "+")
    labels = replace(
        row.labels, values=(0.5, 0.5, None), low=(0.5, 0.5, None), high=(0.5, 0.5, None)
    )
    example = make_examples([replace(row, labels=labels)], TOKENIZER)[0]
    assert example.rollouts[-1] == 0
    assert example.values[-1] is None


def test_the_shared_first_state_counts_once_per_task():
    rows = [label_row(make_trajectory(m, number=i), m) for i, m in enumerate(("+", "-", "+-"))]
    rows.append(label_row(make_trajectory("+", task="other"), "+"))
    examples = make_examples(rows, TOKENIZER)
    assert [e.rollouts[0] for e in examples] == [8, 0, 0, 8]
    assert [e.values[0] is None for e in examples] == [False, True, True, False]


def example_of(length, *, positions=(0,), name="x"):
    return Example(
        input_ids=tuple(range(length)),
        positions=positions,
        rollouts=(1,) * len(positions),
        correct=(1,) * len(positions),
        values=(1.0,) * len(positions),
        task_id="t",
        trajectory_id=name,
    )


def test_the_positions_of_a_turn_share_its_counts_and_its_weight():
    example = make_example((3, 6, 2), (0, 4, 4), (1, 8, 8), (2, 0, 0))
    assert example.positions == (0, 6, 7, 9, 13)
    found = places(example, HEADS["value"].targets(example), inner=True)
    assert [p.column for p in found] == [0, 2, 4, 6, 7, 9, 11, 13]
    assert [p.weight for p in found] == [6, 2, 2, 2, 4, 8, 0, 0]
    assert [p.target for p in found] == [0.5, 1 / 3, 1 / 3, 1 / 3, 1, 1, 0, 0]
    found = places(example, HEADS["binary"].targets(example), inner=True)
    third = pytest.approx(1 / 3)
    assert [p.weight for p in found] == [1, third, third, third, 1, 1, 0, 0]


def test_prefixes_alone_keep_their_whole_weight():
    example = make_example((3, 6, 2), (2, 4, 4))
    found = places(example, HEADS["value"].targets(example), inner=False)
    assert [tuple(p) for p in found] == [(0, 0.5, 6), (6, 1 / 3, 6), (10, 1, 4)]


def test_calls_that_share_a_position_do_not_divide_its_weight():
    example = replace(make_example((1, 6, 2)), calls=((2, 2, 2),))
    found = places(example, HEADS["value"].targets(example), inner=True)
    assert [tuple(p) for p in found] == [(0, 0.5, 6), (2, 1 / 3, 6)]


@pytest.mark.parametrize("calls", [((2,), (4,)), ((1,),), ((2, 1),)])
def test_calls_of_other_steps_are_refused_with_the_row(calls):
    with pytest.raises(InputError, match=r"row a/0: its steps end at tokens \(2,\), their calls"):
        replace(make_example((1, 6, 2)), calls=calls, trajectory_id="a/0")


def test_an_example_knows_where_its_calls_end():
    trajectory = replace(make_trajectory("+"), steps=(with_calls("1", "2"), Step(text="The end")))
    example = make_examples([label_row(trajectory, "+")], TOKENIZER)[0]
    assert example.calls == render([trajectory], TOKENIZER)[0].calls
    assert [len(c) for c in example.calls] == [2, 0]


def test_long_rows_are_an_error_that_names_the_longest():
    with pytest.raises(InputError, match=r"2 of 3 .* \(long: 9\).*--on-long drop"):
        keep_short(
            [example_of(3), example_of(6), example_of(9, name="long")],
            max_length=5,
            on_long="error",
        )


def test_dropped_rows_are_make_example():
    kept, dropped = keep_short([example_of(3), example_of(6)], max_length=5, on_long="drop")
    assert [len(e.input_ids) for e in kept] == [3]
    assert dropped == 1


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    step_tokens=st.integers(10, 200),
    batch_tokens=st.integers(10, 200),
    seed=st.integers(0, 5),
)
def test_a_plan_uses_every_example_once_within_its_budgets(
    lengths, step_tokens, batch_tokens, seed
):
    plan = plan_steps(lengths, step_tokens=step_tokens, batch_tokens=batch_tokens, seed=seed)
    assert sorted(i for step in plan for batch in step for i in batch) == list(range(len(lengths)))
    for step in plan:
        members = [i for batch in step for i in batch]
        assert sum(lengths[i] for i in members) <= step_tokens or len(members) == 1
        for batch in step:
            padded = max(lengths[i] for i in batch) * len(batch)
            assert padded <= batch_tokens or len(batch) == 1
    again = plan_steps(lengths, step_tokens=step_tokens, batch_tokens=batch_tokens, seed=seed)
    assert plan == again


def test_other_epochs_are_shuffled_otherwise():
    plans = [plan_steps([5] * 30, step_tokens=20, batch_tokens=20, seed=s) for s in (0, 1)]
    assert plans[0] != plans[1]


def test_batches_group_by_length():
    assert group_by_length([0, 1, 2, 3], [100, 10, 99, 9], batch_tokens=200) == [[0, 2], [1, 3]]


def test_collate_pads_right_and_gathers_positions():
    examples = [example_of(3, positions=(0, 2)), example_of(5, positions=(4,))]
    batch = collate(
        examples, lambda e: Targets(values=e.values, weights=(2.0,) * len(e.values)), pad_id=77
    )
    assert batch.input_ids_BT.tolist() == [[0, 1, 2, 77, 77], [0, 1, 2, 3, 4]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert list(zip(batch.rows_P.tolist(), batch.columns_P.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 4),
    ]
    assert batch.weights_P.tolist() == [2, 2, 2]


def test_pad_of_equal_rows_has_a_full_mask():
    assert pad([[1, 2], [3, 4]], pad_id=0)[1].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": (9, 0)}, r"row a/0, prefix 0: 9 right answers of 8 rollouts"),
        ({"correct": (1, -1)}, r"row a/0, prefix 1: -1 right answers of 4"),
        ({"values": (0.5, 1.5)}, r"row a/0, prefix 1: label 1.5 is not in \[0, 1\]"),
        ({"values": (math.nan, None)}, r"row a/0, prefix 0: label nan is not in"),
        ({"values": (0.5,)}, r"row a/0: 2 scored prefixes, but 2 rollout counts, .* and 1 labels"),
    ],
)
def test_impossible_counts_and_labels_are_refused_with_the_row(changes, message):
    good = {
        "input_ids": (1, 2, 3),
        "positions": (0, 2),
        "rollouts": (8, 4),
        "correct": (3, 4),
        "values": (0.4, None),
        "task_id": "a",
        "trajectory_id": "a/0",
    }
    Example(**good)
    with pytest.raises(InputError, match=message):
        Example(**(good | changes))
