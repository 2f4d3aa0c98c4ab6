"""The execution oracle on runs written by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.oracle import VALUES, CallVerdict, appears, execution_oracle
from tests.examples import make_trajectory, trajectories
from trajectory.records import Observation, Step, StopReason, ToolCall

FAILED, UNUSED, OK = CallVerdict.FAILED, CallVerdict.UNUSED, CallVerdict.OK


def calls(*results, text="thinking", tool="calculator"):
    """A step: one call per result; an exception's name in a tuple makes it fail."""
    pairs = [result if isinstance(result, tuple) else (result, None) for result in results]
    return Step(
        text=text,
        calls=tuple(ToolCall(name=tool, arguments="{}") for _ in pairs),
        observations=tuple(Observation(content=c, error=e) for c, e in pairs),
    )


def code(*cells):
    """A step of Python calls that print nothing."""
    return Step(
        text="",
        calls=tuple(ToolCall(name="python", arguments=json.dumps({"code": c})) for c in cells),
        observations=tuple(Observation(content="(no output; use print to see)") for _ in cells),
    )


def verdicts(*steps, prompt="How many?", **changes):
    trajectory = make_trajectory(1)
    task = trajectory.task.__class__(task_id="t", domain="d", prompt=prompt, answer="")
    fields = {"steps": steps, "task": task, "answer": None, "prompt_ids": None} | changes
    return [step.verdict for step in execution_oracle(make_trajectory(1, **fields))]


def test_each_verdict_on_one_run():
    run = make_trajectory(
        1,
        steps=(
            calls(("division by zero", "ZeroDivisionError")),
            calls("17"),
            calls("42.0"),
            Step(text="The answer is 42."),
        ),
    )
    found = execution_oracle(run)
    assert [step.step for step in found] == [1, 2, 3, 4]
    assert [step.verdict for step in found] == [FAILED, UNUSED, OK, None]
    assert [step.value for step in found] == [-1, 0, 1, None]
    assert VALUES == {FAILED: -1, UNUSED: 0, OK: 1}


@pytest.mark.parametrize(
    ("result", "later"),
    [
        ("9.0", "9 bolts"),
        ("1234", "1,234 metres"),
        ("-5", "she owes 5"),
        ("6", "6*7"),
        ("3.3333333333333335", "about 3.33"),
        ("0.30000000000000004", "0.3"),
        ("2.5", "rounded up, 3"),
        ("{'name': 'New York'}", "it is new york."),
        ("column user_id", "select USER_ID"),
        ("block b1 is clear", "move b1"),
        ("1e3", "1000"),
        ("Alice", "So it was alice"),
    ],
)
def test_a_value_that_stands_later_is_used(result, later):
    assert appears(result, later)


@pytest.mark.parametrize(
    ("result", "later"),
    [
        ("9", "90 and 19 and x9"),
        ("12", "1 2"),
        ("3.34", "3.33"),
        ("the result is not that", "the result is not there"),
        ("'a'", "a dog"),
        ("", "anything 1"),
        ("17", ""),
        ("(no output; use print to see a value)", "print the value to see it"),
    ],
)
def test_other_text_is_no_use(result, later):
    assert not appears(result, later)


def test_a_plain_word_counts_only_if_the_result_brought_it():
    assert appears("Oslo", "I choose Oslo", known={"bergen"})
    assert not appears("Oslo", "I choose Oslo", known={"oslo"})
    assert verdicts(calls("Oslo"), Step(text="So Oslo."), prompt="Capital?") == [OK, None]
    assert verdicts(calls("Oslo"), Step(text="So Oslo."), prompt="Is it Oslo?") == [UNUSED, None]


def test_the_answer_and_the_arguments_of_later_calls_are_use():
    assert verdicts(calls("17"), Step(text=""), answer="17") == [OK, None]
    arguments = json.dumps({"code": "a\n17"})
    later = Step(
        text="",
        calls=(ToolCall(name="other", arguments=arguments),),
        observations=(Observation(content="", error="x"),),
    )
    assert verdicts(calls("17"), later) == [OK, FAILED]


def test_what_stands_only_in_the_same_turn_or_a_later_result_is_no_use():
    assert verdicts(calls("17", text="I expect 17"), Step(text="Done.")) == [UNUSED, None]
    assert verdicts(calls("17"), calls("17"), Step(text="Done.")) == [UNUSED, UNUSED, None]


def test_a_step_fails_with_any_call_and_is_used_with_any():
    assert verdicts(calls("1", ("no", "KeyError")), Step(text="1")) == [FAILED, None]
    assert verdicts(calls("17", "18"), Step(text="18")) == [OK, None]
    run = make_trajectory(1, steps=(calls("17", "18"), Step(text="18")), answer="18")
    assert execution_oracle(run)[0].calls == (UNUSED, OK)


@pytest.mark.parametrize(
    ("cells", "first"),
    [
        (["x = 3", "print(x)"], OK),
        (["x = 3", "y = 4", "print(x + y)"], OK),
        (["x = 3", "print(4)"], UNUSED),
        (["x = 3", "x = 4", "print(x)"], UNUSED),
        (["x = 3", "x = x + 1"], OK),
        (["x = 3", "x += 1"], OK),
        (["x = 3", "if c:\n    x = 4\nprint(x)"], OK),
        (["def f(a):\n    inner = a\n    return inner", "f(1)"], OK),
        (["def f(a):\n    inner = a\n    return inner", "print(inner)"], UNUSED),
        (["import math", "math.pi"], OK),
        (["from math import pi as p", "p"], OK),
        (["for i in range(3):\n    total = i", "total"], OK),
        (["x = 3", "not python ("], UNUSED),
        (["x = '\\d'", "x"], OK),
    ],
)
def test_a_name_read_by_later_code_is_use(cells, first):
    assert verdicts(*(code(cell) for cell in cells), Step(text="Done."))[0] is first
    # The same cells as calls of one turn.
    run = make_trajectory(1, steps=(code(*cells), Step(text="Done.")))
    assert execution_oracle(run)[0].calls[0] is first


def test_code_of_other_tools_binds_nothing():
    arguments = json.dumps({"code": "x = 3"})
    other = Step(
        text="",
        calls=(ToolCall(name="shell", arguments=arguments),),
        observations=(Observation(content=""),),
    )
    assert verdicts(other, code("print(x)"), Step(text="Done."))[0] is UNUSED


def test_a_tool_whose_result_is_its_state_is_used():
    moved = calls("You pick up the red block.", tool="blocks")
    refused = calls(("The hand is full.", "illegal_move"), tool="blocks")
    assert verdicts(moved, refused, Step(text="Done.")) == [OK, FAILED, None]
    run = make_trajectory(1, steps=(moved, Step(text="Done.")))
    assert execution_oracle(run, state_tools=frozenset())[0].verdict is UNUSED


def test_a_cut_off_run_says_nothing_of_its_last_result():
    cut = {"stop": StopReason.MAX_STEPS, "outcome": None, "answer": None}
    assert verdicts(calls("17"), calls("18"), **cut) == [UNUSED, None]
    assert verdicts(calls("17"), calls(("no", "KeyError")), **cut) == [UNUSED, FAILED]
    assert verdicts(calls("17")) == [UNUSED]


@given(trajectories())
def test_any_trajectory_gets_one_verdict_per_step_and_call(trajectory):
    found = execution_oracle(trajectory)
    assert len(found) == trajectory.num_steps
    for step, judged in zip(trajectory.steps, found, strict=True):
        assert len(judged.calls) == len(step.calls)
        assert (judged.verdict is FAILED) == any(o.error is not None for o in step.observations)
        assert judged.verdict in (*judged.calls, None)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_more_text_never_unuses_a_result(result, later, more):
    assert appears(result, later) <= appears(result, f"{later}\n{more}")


@given(st.decimals(0, 10**6, places=3), st.sampled_from(["{}", "so {} it is", "x={};"]))
def test_a_number_appears_wherever_it_is_written(number, frame):
    assert appears(str(number), frame.format(number))
    assert appears(str(number), frame.format(round(number, 1)))
