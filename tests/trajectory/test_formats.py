"""Chat messages with tool calls, out and in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import make_step, make_trajectory
from trajectory.formats import format_call, from_messages, to_messages
from trajectory.records import Observation, Step, StopReason, Task, ToolCall

TASK = Task(task_id="t", domain="jsonl", prompt="What is 1+1?", answer="2")
CALL = {"id": "x", "type": "function", "function": {"name": "calculator", "arguments": "{}"}}
USER = {"role": "user", "content": "What is 1+1?"}


def read(*messages, **options):
    return from_messages(messages, trajectory_id="a", task=TASK, **options)


def test_a_trajectory_as_messages():
    messages = to_messages(make_trajectory(num_steps=2), system="Be exact.")
    assert messages == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "What is 1 + 1 + 1?"},
        {
            "role": "assistant",
            "content": "Add one.",
            "tool_calls": [
                {
                    "id": "call_0_0",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0_0", "content": "2"},
        {"role": "assistant", "content": "The answer is 3."},
    ]


_json_arguments = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)).map(
    json.dumps
)
_thoughts = st.text(max_size=20).map(str.rstrip).filter(lambda t: "<tool_call>" not in t)


@st.composite
def canonical_steps(draw):
    """Steps whose text is a thought followed by the calls as `format_call` writes them."""
    calls = draw(
        st.lists(
            st.builds(ToolCall, name=st.text(max_size=9), arguments=_json_arguments), max_size=2
        )
    )
    calls = tuple(c for c in calls if "<tool_call>" not in c.name + c.arguments)
    calls = tuple(c for c in calls if "</tool_call>" not in c.name + c.arguments)
    thought, written = draw(_thoughts), "\n".join(map(format_call, calls))
    return Step(
        text=f"{thought}\n{written}" if thought and written else thought + written,
        calls=calls,
        observations=tuple(Observation(content=draw(st.text(max_size=9))) for _ in calls),
    )


@given(st.lists(canonical_steps(), max_size=3), st.none() | st.floats(0, 1))
def test_round_trip_is_exact(steps, outcome):
    stop = StopReason.MAX_STEPS if outcome is None else StopReason.ANSWERED
    trajectory = make_trajectory(steps=tuple(steps), stop=stop, outcome=outcome)
    messages = to_messages(trajectory, "system")
    assert json.loads(json.dumps(messages)) == messages
    back = from_messages(
        messages,
        trajectory_id=trajectory.trajectory_id,
        task=trajectory.task,
        outcome=outcome,
        answer=trajectory.answer,
    )
    assert back.steps == trajectory.steps
    assert (back.stop, back.outcome, back.answer) == (stop, outcome, trajectory.answer)


def test_code_written_in_a_fence_is_not_said_twice():
    step = make_step(
        text="Let me run it.\n```python\nprint(1)\n```",
        calls=(ToolCall(name="python", arguments='{"code": "print(1)\\n"}'),),
    )
    message = to_messages(make_trajectory(steps=(step,)))[1]
    assert message["content"] == "Let me run it."


def test_a_fence_that_is_no_call_stays_in_the_thought():
    step = make_step(text="I saw\n```\nx\n```\nso\n" + make_step().text)
    message = to_messages(make_trajectory(steps=(step,)))[1]
    assert message["content"] == "I saw\n```\nx\n```\nso\nAdd one."


def test_results_are_matched_by_id():
    other = CALL | {"id": "y", "function": {"name": "search", "arguments": {"q": 1}}}
    step = read(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, other]},
        {"role": "tool", "tool_call_id": "y", "content": "second"},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "first"}]},
    ).steps[0]
    assert [o.content for o in step.observations] == ["first", "second"]
    assert step.calls[1] == ToolCall(name="search", arguments='{"q": 1}')


def test_results_without_ids_are_taken_in_order():
    step = read(
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "y"}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ).steps[0]
    assert [o.content for o in step.observations] == ["1", "2"]


def test_reasoning_is_kept_as_thought():
    message = {"role": "assistant", "content": "Two.", "reasoning_content": "1+1"}
    assert read(USER, message, outcome=1.0).steps[0].text == "<think>\n1+1\n</think>\nTwo."


def test_the_stop_reason_follows_the_outcome_unless_given():
    message = {"role": "assistant", "content": "2"}
    assert read(USER, message).stop is StopReason.MAX_STEPS
    assert read(USER, message, outcome=0.0).stop is StopReason.ANSWERED
    given = read(USER, message, stop=StopReason.TOOL_FAILURE)
    assert given.stop is StopReason.TOOL_FAILURE


def test_arguments_that_are_no_json_are_kept_as_text():
    written = format_call(ToolCall(name="c", arguments="oops"))
    assert json.loads(written.splitlines()[1]) == {"name": "c", "arguments": "oops"}


ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERS = {"role": "tool", "tool_call_id": "x", "content": "2"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, ASKS], r"messages\[1\]: the call of 'calculator' has no tool result"),
        ([USER, ANSWERS], r"messages\[1\]: role 'tool' before any assistant"),
        ([USER, ASKS, ANSWERS, ANSWERS], r"messages\[3\]: a tool result without a call"),
        ([USER, ASKS, ANSWERS | {"tool_call_id": "z"}], r"messages\[2\]: a tool result without"),
        ([USER, ASKS, ANSWERS, USER], r"messages\[3\]: role 'user' where an assistant"),
        ([USER, {"role": "critic"}], r"messages\[1\]: role 'critic'"),
        ([USER, ASKS | {"tool_calls": "x"}], r"messages\[1\]\.tool_calls: expected a list"),
        ([USER, ASKS | {"tool_calls": [{"id": 1}]}], r"tool_calls\[0\]: expected an object with"),
        (
            [USER, ASKS | {"tool_calls": [{"function": {"arguments": "{}"}}]}],
            r"tool_calls\[0\]: the function has no name",
        ),
        (
            [USER, ASKS | {"tool_calls": [{"function": {"name": "c", "arguments": 3}}]}],
            r"tool_calls\[0\]: arguments must be JSON text or an object",
        ),
        ([USER, ASKS | {"content": 3}, ANSWERS], r"messages\[1\]\.content: expected text"),
        (
            [USER, ASKS, ANSWERS | {"content": [{"type": "image_url"}]}],
            r"messages\[2\]\.content: expected text",
        ),
    ],
)
def test_malformed_conversations_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        read(*messages)
