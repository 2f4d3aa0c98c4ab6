"""Tracking: curves and tables in files or in W&B (offline), and ids that survive resumption."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.examples import make_scores, make_trajectory
from trajectory.errors import InputError
from trajectory.store import read_jsonl
from trajectory.tracking import MetricsEntry, TableRow, make_tracker, read_metrics, table_rows


def open_tracker(kind, out):
    return make_tracker(kind, out=out, name="test", config={"rollouts": 8, "agent": {"tools": []}})


def test_jsonl_keeps_the_curves(tmp_path):
    tracker = open_tracker("jsonl", tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": math.nan, "kl": 1})
    tracker.close()
    assert read_metrics(tmp_path) == [
        MetricsEntry(step=1, metrics={"loss": 0.5}),
        MetricsEntry(step=2, metrics={"loss": None, "kl": 1.0}),
    ]


def test_the_last_entry_of_a_step_counts_after_resumption(tmp_path):
    tracker = open_tracker("jsonl", tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "met')  # killed while writing
    resumed = open_tracker("jsonl", tmp_path)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    assert [(e.step, e.metrics["loss"]) for e in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "wandb"])
def test_the_run_id_survives_resumption(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for _ in range(2):
        tracker = open_tracker(kind, tmp_path)
        tracker.log(1, {"loss": 0.5})
        tracker.close()
        tracker.close()
        ids.append(tracker.run_id)
    assert ids[0] == ids[1] != ""


def test_wandb_offline_leaves_files_to_sync(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trajectory = make_trajectory(2)
    tracker = open_tracker("wandb", tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.table("held_out", [trajectory], [make_scores(trajectory)])
    tracker.close()
    (run_file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{tracker.run_id}.wandb")
    assert run_file.stat().st_size > 0
    (table_file,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    table = json.loads(table_file.read_text())
    assert table["columns"] == list(TableRow.__dataclass_fields__)
    assert [row[7] for row in table["data"]] == [1 / 3, 2 / 3]
    with pytest.raises(ValueError, match="closed"):
        tracker.log(2, {"loss": 0.4})


def test_wandb_without_login_says_what_to_do(tmp_path):
    code = (
        "import pathlib, sys; from trajectory.tracking import make_tracker\n"
        "make_tracker('wandb', out=pathlib.Path(sys.argv[1]), name='test', config={})\n"
    )
    hidden = ("WANDB_API_KEY", "WANDB_MODE")  # a fresh process: W&B remembers its first login
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InputError: --track wandb needs a login: run `wandb login`, or set" in result.stderr


def test_jsonl_tables_hold_a_row_per_step(tmp_path):
    trajectory = make_trajectory(2)
    tracker = open_tracker("jsonl", tmp_path)
    tracker.table("held_out", [trajectory], [make_scores(trajectory)])
    tracker.close()
    first, second = read_jsonl(tmp_path / "tables" / "held_out.jsonl", TableRow)
    assert first == TableRow(
        trajectory_id="run-1/task-7/0",
        prompt="What is 1 + 1 + 1?",
        step=1,
        text=trajectory.steps[0].text,
        calls='calculator {"expression": "1+1"}',
        observations="2",
        score_before=0.0,
        score_after=1 / 3,
        outcome=1.0,
    )
    assert (second.step, second.score_before, second.calls) == (2, 1 / 3, "")


def test_tables_without_scores_say_so():
    rows = table_rows([make_trajectory(2)], None)
    assert [(row.score_before, row.score_after) for row in rows] == [(None, None)] * 2


def test_scores_of_other_trajectories_are_refused():
    ours, other = make_trajectory(2), make_trajectory(2, trajectory_id="other")
    with pytest.raises(ValueError, match="the scores are of other"):
        table_rows([ours], [make_scores(other)])
    with pytest.raises(ValueError, match="with 4 prefixes"):
        table_rows([ours], [make_scores(make_trajectory(3))])
    with pytest.raises(ValueError):
        table_rows([ours], [])


def test_none_writes_nothing(tmp_path):
    tracker = open_tracker("none", tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.table("x", [make_trajectory()], None)
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert tracker.run_id == ""


def test_an_unknown_tracker_gets_the_valid_list(tmp_path):
    with pytest.raises(InputError, match="the trackers are wandb, jsonl, none"):
        open_tracker("mlflow", tmp_path)


def test_a_damaged_id_file_is_refused(tmp_path):
    (tmp_path / "tracking.json").write_text("{}")
    with pytest.raises(InputError, match="tracking.json is damaged"):
        open_tracker("jsonl", tmp_path)


def test_curves_of_a_folder_without_any_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl does not exist"):
        read_metrics(tmp_path)
