import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.best_of_n import (
    BestOfNConfig,
    Candidate,
    best_of_n,
    compare,
    majority_vote,
    mean_outcome,
    oracle,
)
from trajectory.errors import InputError
from trajectory.records import StepScores, StopReason, Task, Trajectory
from trajectory.store import write_jsonl

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        answer=st.none() | st.sampled_from(["1", "1.0", "2", "x"]),
        outcome=st.sampled_from([0.0, 1.0]),
        score=st.floats(0, 1),
    ),
    min_size=1,
    max_size=6,
)


@given(CANDIDATES)
def test_no_chooser_beats_the_oracle_or_leaves_the_unit_interval(candidates):
    for chooser in (best_of_n, majority_vote, mean_outcome):
        assert 0 <= chooser(candidates) <= oracle(candidates)


def write(folder, scores):
    answers = {"a": [("7", 1.0), ("8", 0.0)], "b": [("3", 0.0), ("4", 1.0)]}
    trajectories, lines = [], []
    for task, pairs in answers.items():
        for i, (answer, outcome) in enumerate(pairs):
            name = f"{task}/{i}"
            trajectories.append(
                Trajectory(
                    trajectory_id=name,
                    task=Task(task_id=task, domain="math", prompt="p", answer="0"),
                    steps=(),
                    stop=StopReason.ANSWERED,
                    answer=answer,
                    outcome=outcome,
                )
            )
            if name in scores:
                lines.append(
                    StepScores(
                        trajectory_id=name,
                        checkpoint="c",
                        values=(scores[name],),
                        kind="value",
                        position="observation",
                    )
                )
    write_jsonl(folder / "t.jsonl", trajectories)
    write_jsonl(folder / "s.jsonl", lines)
    return BestOfNConfig(
        trajectories=folder / "t.jsonl", scores=(folder / "s.jsonl",), out=folder / "out.json"
    )


def test_two_tasks_by_hand(tmp_path):
    # the PRM picks the right answer of task a and the wrong one of task b
    config = write(tmp_path, {"a/0": 0.9, "a/1": 0.1, "b/0": 0.8, "b/1": 0.7})
    result = compare(config)
    assert {name: r["value"] for name, r in result.items()} == {
        "mean (random choice)": 0.5,
        "majority vote": 0.5,
        "best by PRM (s)": 0.5,
        "oracle": 1.0,
    }
    assert json.loads((tmp_path / "out.json").read_text())["tasks"] == 2
    assert result["oracle"]["gain"] == 0.5


def test_a_missing_score_is_named(tmp_path):
    with pytest.raises(InputError, match="no score for trajectory 'b/1'"):
        compare(write(tmp_path, {"a/0": 0.9, "a/1": 0.1, "b/0": 0.8}))
