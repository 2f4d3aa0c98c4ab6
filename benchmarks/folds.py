"""``python -m benchmarks folds``: splits a label folder by task, for out-of-fold scores.

With few labelled tasks, a PRM trained on the other folds scores each fold, so that every task is
judged by a model that never saw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.run import config_dict, open_run, read_manifest
from trajectory.store import read_labels, write_jsonl, write_labels


@dataclass(frozen=True, kw_only=True)
class FoldsConfig:
    """Split labels into folds by task."""

    labels: Path
    """Folder that `prm label` wrote."""
    out: Path
    """Folder for I-train and I-test, each like a label folder, for every fold I."""
    folds: int = 2
    """How many, >= 2."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(f"--folds must be >= 2, not {self.folds}")


def split(config: FoldsConfig) -> int:
    """Write the folds; returns how many tasks there are.

    Raises
    ------
    InputError
        If the folder holds no labels, or fewer tasks than folds.
    """
    read_manifest(config.labels)
    rows = read_labels(config.labels / "labels.parquet")
    tasks = list(dict.fromkeys(row.trajectory.task.task_id for row in rows))
    if len(tasks) < config.folds:
        raise InputError(f"{config.labels} holds {len(tasks)} tasks: too few for {config.folds}")
    for fold in range(config.folds):
        held_out = set(tasks[fold :: config.folds])
        for name, wanted in (("train", set(tasks) - held_out), ("test", held_out)):
            _write(config, f"{fold}-{name}", rows, wanted)
    Console().print(f"{len(tasks)} tasks in {config.folds} folds under {config.out}")
    return len(tasks)


def _write(config: FoldsConfig, name: str, rows: list[LabelledTrajectory], tasks: set[str]) -> None:
    """Write the rows of some tasks as a label folder."""
    kept = [row for row in rows if row.trajectory.task.task_id in tasks]
    settings = {**config_dict(config), "part": name}
    folder = config.out / name
    with open_run(folder, kind="label", config=settings, parents=[config.labels]) as run:
        write_labels(folder / "labels.parquet", kept)
        write_jsonl(folder / "trajectories.jsonl", [row.trajectory for row in kept])
        run.finish({"labelled": len(kept)})
