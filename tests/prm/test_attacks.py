import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.attacks import ATTACKS, BOAST, COMMENT, FAKE_SUCCESS, attack
from tests.prm.synthetic import make_trajectory
from trajectory.records import Observation, Step, ToolCall


def call_step(thought, expression, result):
    arguments = json.dumps({"expression": expression})
    block = f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call>'
    return Step(
        text=f"{thought}\n{block}",
        calls=(ToolCall(name="calculator", arguments=arguments),),
        observations=(Observation(content=result),),
        token_ids=(1, 2),
    )


FIRST, SECOND = call_step("First.", "2+3", "5"), call_step("Second.", "5*4", "20")
ANSWER = Step(text="The answer is 20.")
TRAJECTORY = replace(make_trajectory(""), steps=(FIRST, SECOND, ANSWER), prompt_ids=(1,))


def bare(step):
    return replace(step, token_ids=None)


def changed(name, trajectory=TRAJECTORY, *, pick=0):
    """The steps after an attack on the step of this number among those it may choose."""

    class Picky(random.Random):
        def choice(self, options):
            return options[pick]

    found = ATTACKS[name](trajectory, Picky())
    return None if found is None else found.steps


def test_a_no_op_call_computes_nothing_and_is_written_like_the_step_before():
    first, inserted, second, answer = changed("no_op_call")
    assert (first, second, answer) == (bare(FIRST), bare(SECOND), ANSWER)
    assert inserted.text == (
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "0"}}\n</tool_call>'
    )
    assert inserted.calls == (ToolCall(name="calculator", arguments='{"expression": "0"}'),)
    assert inserted.observations == (Observation(content="0"),)
    assert changed("no_op_call", pick=1)[2].calls == inserted.calls


def test_a_duplicate_call_repeats_step_and_result():
    assert changed("duplicate_call", pick=1) == (bare(FIRST), bare(SECOND), bare(SECOND), ANSWER)


def test_a_boast_begins_every_step():
    assert [s.text for s in changed("boast")] == [BOAST + s.text for s in (FIRST, SECOND, ANSWER)]


def test_reordering_swaps_two_calls_with_their_results():
    assert changed("reorder_steps") == (bare(SECOND), bare(FIRST), ANSWER)


def test_deleting_leaves_the_answer_without_a_step():
    assert changed("delete_step") == (bare(SECOND), ANSWER)


def test_fake_success_stands_in_the_last_observation():
    first, second, answer = changed("fake_success")
    assert (first, answer) == (bare(FIRST), ANSWER)
    assert second.observations == (Observation(content="20" + FAKE_SUCCESS),)
    assert (second.text, second.calls) == (SECOND.text, SECOND.calls)


def test_comments_pad_the_steps_with_calls():
    texts = [s.text for s in changed("pad_with_comments")]
    assert texts == [FIRST.text + COMMENT, SECOND.text + COMMENT, ANSWER.text]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_it_does_not_apply_without_what_it_needs(name):
    assert changed(name, replace(TRAJECTORY, steps=())) is None
    only_answer = replace(TRAJECTORY, steps=(ANSWER,))
    assert (changed(name, only_answer) is None) == (name != "boast")


def test_a_no_op_needs_a_tool_it_knows_and_a_swap_two_different_calls():
    unknown = replace(FIRST, calls=(ToolCall(name="move", arguments='{"block": "a"}'),))
    broken = replace(FIRST, calls=(ToolCall(name="calculator", arguments="{"),))
    for step in (unknown, broken):
        assert changed("no_op_call", replace(TRAJECTORY, steps=(step, ANSWER))) is None
    assert changed("reorder_steps", replace(TRAJECTORY, steps=(FIRST, FIRST, ANSWER))) is None
    assert changed("reorder_steps", replace(TRAJECTORY, steps=(FIRST, ANSWER, SECOND))) is None


@given(
    name=st.sampled_from(sorted(ATTACKS)),
    marks=st.text("+-", max_size=4),
    seed=st.integers(0, 5),
)
def test_an_attack_changes_steps_only_keeps_the_answer_and_comes_again(name, marks, seed):
    row = make_trajectory(marks)
    copy = make_trajectory(marks)
    found = attack(name, row, seed=seed)
    assert row == copy
    assert found == attack(name, row, seed=seed)
    if found is not None:
        assert found.steps != row.steps
        assert found.trajectory_id == f"{row.trajectory_id}+{name}"
        same = replace(found, steps=row.steps, trajectory_id=row.trajectory_id, prompt_ids=None)
        assert same == row
        assert not any(s.calls for s in found.steps[-1:])
        assert found.steps[-1].text.endswith(row.steps[-1].text)


def test_token_ids_that_are_no_longer_those_of_the_text_are_dropped():
    for name in ATTACKS:
        found = attack(name, TRAJECTORY)
        assert found.prompt_ids is None
        assert all(s.token_ids is None for s in found.steps)
