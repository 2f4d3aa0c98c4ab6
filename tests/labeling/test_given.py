from dataclasses import replace

import pytest

from labeling.config import LabelConfig
from labeling.run import label
from tests.examples import make_step, make_trajectory
from tests.labeling.walker import WalkerEngine, agent_config
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.store import encode_line, write_jsonl


def example(number=0, **changes):
    """A labelable trajectory in the domain of the walker's tasks."""
    trajectory = make_trajectory(trajectory_id=f"a/{number}", **changes)
    return replace(trajectory, task=replace(trajectory.task, domain="jsonl"))


def label_file(lab, tmp_path, source):
    config = LabelConfig(
        agent=agent_config(lab), out=tmp_path / "labels", rollouts=2, trajectories=source
    )
    return label(config, engine=WalkerEngine(lab / "policy"))


def other_task(trajectory):
    return replace(trajectory, task=replace(trajectory.task, answer="4"))


def without_call(trajectory):
    silent = make_step(calls=(), observations=())
    return replace(trajectory, steps=(silent, *trajectory.steps[1:]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (example(0), r"given\.jsonl, line 2: trajectory 'a/0' repeats an id"),
        (make_trajectory(trajectory_id="b"), r"line 2: .*'arithmetic', --tasks names 'jsonl'"),
        (other_task(example(1)), r"line 2: .*another task than earlier lines with id 'task-7'"),
        (without_call(example(1)), r"line 2: .*no tool call in step 1 of 2"),
    ],
)
def test_trajectories_that_do_not_fit_are_refused_by_line(lab, tmp_path, second, message):
    source = tmp_path / "given.jsonl"
    write_jsonl(source, [example(0), second])
    with pytest.raises(InputError, match=message):
        label_file(lab, tmp_path, source)


def test_a_malformed_line_is_refused_by_number(lab, tmp_path):
    source = tmp_path / "given.jsonl"
    source.write_bytes(encode_line(example(0)) + b'{"trajectory_id": "x"}\n')
    with pytest.raises(InputError, match=r"given\.jsonl, line 2: missing field"):
        label_file(lab, tmp_path, source)


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_file_is_refused(lab, tmp_path, content):
    source = tmp_path / "given.jsonl"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError, match=r"given\.jsonl (does not exist|holds no trajectory)"):
        label_file(lab, tmp_path, source)


def test_a_file_that_was_refused_can_be_repaired_and_labelled_in_the_same_folder(lab, tmp_path):
    source = tmp_path / "given.jsonl"
    write_jsonl(source, [example(0), example(0)])
    with pytest.raises(InputError, match="repeats an id"):
        label_file(lab, tmp_path, source)
    write_jsonl(source, [example(0)])
    assert label_file(lab, tmp_path, source).counts["labelled"] == 1


def test_a_given_trajectory_that_failed_is_kept_and_counted(lab, tmp_path):
    source = tmp_path / "given.jsonl"
    broken = example(1, stop=StopReason.TOOL_FAILURE, outcome=None, answer=None)
    write_jsonl(source, [example(0), broken])
    counts = label_file(lab, tmp_path, source).counts
    assert (counts["trajectories"], counts["trajectories_failed"], counts["labelled"]) == (2, 1, 1)
