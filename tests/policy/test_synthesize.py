import json
from pathlib import Path

import pytest

from agent.tasks.arithmetic import gold_problem
from policy.synthesize import SynthesizeConfig, read_marks, synthesize
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.run import read_manifest
from trajectory.store import read_jsonl

TWO_CALLS = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"
)


def written(folder: Path, *rows: dict[str, str]) -> str:
    """A file of word problems, as a task source."""
    path = folder / "problems.jsonl"
    lines = [json.dumps({"problem": "How many clips?", **row}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return f"math:{path}"


def made(out: Path, **settings: object) -> list[Trajectory]:
    return list(read_jsonl(synthesize(SynthesizeConfig(out=out, **settings)), Trajectory))


def counts(out: Path) -> dict[str, int]:
    return dict(read_manifest(out).counts)


# --- marks


def test_text_before_a_mark_is_the_thought_and_the_mark_the_call():
    marks, rest = read_marks(TWO_CALLS)
    assert [(m.thought, m.expression, m.result) for m in marks] == [
        ("Natalia sold 48/2 =", "48/2", "24"),
        ("24 clips in May.\nNatalia sold 48+24 =", "48+24", "72"),
    ]
    assert rest == "72 clips altogether."


def test_a_solution_without_marks_is_all_rest():
    assert read_marks("It is 5.\n#### 5") == ([], "It is 5.")


# --- written solutions


@pytest.mark.parametrize(("tool", "result"), [("calculator", "24"), ("python", "24.0")])
def test_a_written_solution_becomes_turns_with_real_results(tmp_path, tool, result):
    tasks = written(tmp_path, {"answer": "72", "solution": TWO_CALLS})
    (trajectory,) = made(tmp_path / "out", tasks=tasks, tool=tool, allow_unsafe_tools=True)
    first, second, last = trajectory.steps
    assert first.text.startswith("Natalia sold 48/2 =\n<tool_call>\n")
    assert first.observations[0].content.strip() == result
    assert second.observations[0].content.strip() == "72"
    assert last.text == "72 clips altogether.\nThe answer is \\boxed{72}."
    assert (trajectory.answer, trajectory.outcome) == ("72", 1.0)
    assert trajectory.tools == (tool,)


def test_unsound_solutions_are_dropped_and_counted_by_reason(tmp_path):
    tasks = written(
        tmp_path,
        {"answer": "72", "solution": TWO_CALLS},
        {"answer": "5", "solution": "It is 5.\n#### 5"},
        {"answer": "7", "solution": "<<3+3=7>>7\n#### 7"},
        {"answer": "9", "solution": "<<3+3=6>>6, so 9.\n#### 9"},
        {"answer": "2", "solution": "<<100*2%=2>>2\n#### 2"},
        {"answer": "3", "solution": "<<1+1=2>> <<2+1=3>> <<3*1=3>>3\n#### 3"},
    )
    out = tmp_path / "out"
    (only,) = made(out, tasks=tasks, tool="calculator", max_calls=2)
    assert only.answer == "72"
    assert counts(out) == {
        "tasks": 6,
        "written": 1,
        "correct": 1,
        "dropped_no_marks": 1,
        "dropped_result_differs": 1,
        "dropped_answer_not_computed": 1,
        "dropped_tool_error": 1,
        "dropped_too_many_calls": 1,
    }


def test_rows_without_a_solution_are_an_error(tmp_path):
    tasks = written(tmp_path, {"answer": "72"})
    with pytest.raises(InputError, match="no solution to follow"):
        made(tmp_path / "out", tasks=tasks, tool="calculator")


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    tasks = written(tmp_path, {"answer": "5", "solution": "It is 5."})
    with pytest.raises(InputError, match="'dropped_no_marks': 1"):
        made(tmp_path / "out", tasks=tasks, tool="calculator")


def test_real_solutions_survive_in_their_majority(tmp_path, shared):
    rows = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:200]
    (tmp_path / "gsm.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    trajectories = made(out, tasks=f"math:{tmp_path / 'gsm.jsonl'}", tool="calculator")
    assert len(trajectories) > 140
    assert all(t.outcome == 1.0 for t in trajectories)
    assert sum(n for name, n in counts(out).items() if name.startswith("dropped")) == (
        200 - len(trajectories)
    )


# --- the laboratory


def test_without_slips_every_demonstration_is_right(tmp_path):
    trajectories = made(tmp_path / "out", tasks="arithmetic", num_tasks=40, slip=0.0)
    assert len(trajectories) == 40
    assert all(t.outcome == 1.0 for t in trajectories)
    assert counts(tmp_path / "out")["correct"] == 40


def test_slips_make_wrong_answers_that_are_kept(tmp_path):
    trajectories = made(tmp_path / "out", tasks="arithmetic", num_tasks=100, slip=1.0, contrast=0.0)
    assert len(trajectories) >= 100
    assert sum(t.outcome or 0 for t in trajectories) < 0.3 * len(trajectories)


def test_demonstrations_of_one_task_differ_in_their_slips(tmp_path):
    trajectories = made(tmp_path / "out", tasks="arithmetic", num_tasks=10, samples=6)
    assert len({t.trajectory_id for t in trajectories}) == 60
    assert len({tuple(s.text for s in t.steps) for t in trajectories}) > 15


def test_long_demonstrations_can_be_left_out(tmp_path):
    out = tmp_path / "out"
    trajectories = made(out, tasks="arithmetic", num_tasks=50, slip=0.0, max_calls=3)
    assert {len(gold_problem(t.task).operations) for t in trajectories} == {2, 3}
    assert counts(out)["dropped_too_many_calls"] == 50 - len(trajectories)


def test_the_same_command_writes_the_same_bytes(tmp_path):
    settings = {"tasks": "arithmetic", "num_tasks": 20}
    made(tmp_path / "a", **settings)
    made(tmp_path / "b", **settings)
    one, two = ((tmp_path / name / "trajectories.jsonl").read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "arithmetic", "num_tasks": 0}, "--num-tasks must be >= 1"),
        ({"tasks": "arithmetic", "num_tasks": 1, "slip": 1.5}, "--slip must be between 0 and 1"),
        ({"tasks": "arithmetic", "num_tasks": 1, "tool": "python"}, "demonstrated with calculator"),
        ({"tasks": "arithmetic"}, "--num-tasks"),
        ({"tasks": "algebra", "num_tasks": 1}, "unknown tasks 'algebra'"),
        ({"tasks": "math:x.jsonl", "slip": 0.5}, "--slip is for --tasks arithmetic"),
        ({"tasks": "math:x.jsonl", "samples": 2}, "--samples is for --tasks arithmetic"),
        ({"tasks": "math:x.jsonl", "tool": "calculator"}, "no file x.jsonl"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        made(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
