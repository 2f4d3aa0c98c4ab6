from dataclasses import replace

import pytest

from benchmarks.folds import FoldsConfig, split
from tests.examples import make_labelled
from trajectory.errors import InputError
from trajectory.run import open_run
from trajectory.store import read_labels, write_labels


def label_folder(folder, tasks):
    rows = []
    for task in tasks:
        for sample in range(2):
            name = f"{task}/{sample}"
            row = make_labelled()
            trajectory = replace(
                row.trajectory, trajectory_id=name, task=replace(row.trajectory.task, task_id=task)
            )
            rows.append(
                replace(
                    row,
                    trajectory=trajectory,
                    evidence=replace(row.evidence, trajectory_id=name),
                    labels=replace(row.labels, trajectory_id=name),
                )
            )
    with open_run(folder, kind="label", config={}) as run:
        write_labels(folder / "labels.parquet", rows)
        run.finish({})


def tasks_of(folder):
    return {row.trajectory.task.task_id for row in read_labels(folder / "labels.parquet")}


def test_every_task_is_held_out_once_and_never_trained_on_then(tmp_path):
    label_folder(tmp_path / "labels", "abcde")
    split(FoldsConfig(labels=tmp_path / "labels", out=tmp_path / "folds"))
    held_out = [tasks_of(tmp_path / f"folds/{i}-test") for i in range(2)]
    assert held_out == [{"a", "c", "e"}, {"b", "d"}]
    for i in range(2):
        assert tasks_of(tmp_path / f"folds/{i}-train") == set("abcde") - held_out[i]
        assert (tmp_path / f"folds/{i}-test/trajectories.jsonl").exists()


def test_too_few_tasks_are_refused(tmp_path):
    label_folder(tmp_path / "labels", "a")
    with pytest.raises(InputError, match="too few for 2"):
        split(FoldsConfig(labels=tmp_path / "labels", out=tmp_path / "folds"))


def test_a_folder_without_labels_is_refused(tmp_path):
    with pytest.raises(InputError):
        split(FoldsConfig(labels=tmp_path, out=tmp_path / "folds"))
