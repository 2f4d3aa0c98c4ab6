"""TRL's stepwise supervision: a prompt, its completions (steps) and one label per step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, Field, field_validator

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory, Task
from trajectory.step_formats.rated import RatedTrajectory, Rating, step_text, text_trajectory
from trajectory.step_formats.rows import data_files, problem_id, read_rows, stem, write_rows

NAME = "trl"


class Row(BaseModel):
    """One row; labels may be fractions, which TRL's own trainer cut to 0."""

    prompt: str
    completions: list[str] = Field(min_length=1)
    labels: list[float | None]

    @field_validator("labels")
    @classmethod
    def _some_label(cls, labels: list[float | None]) -> list[float | None]:
        if all(label is None for label in labels):
            raise ValueError("the row has no label: leave it out")
        return labels


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows ``{prompt, completions, labels}``.

    Raises
    ------
    InputError
        If a row is malformed; names file and line.
    """
    for file in data_files(path):
        for number, (place, row) in enumerate(read_rows(file, Row), start=1):
            task = Task(task_id=problem_id(row.prompt), domain="text", prompt=row.prompt, answer="")
            ratings: list[Rating] = list(row.labels)
            yield RatedTrajectory(
                trajectory=text_trajectory(
                    trajectory_id=f"{stem(file)}/{number}", task=task, steps=row.completions
                ),
                ratings=tuple(ratings),
                source=NAME,
                place=place,
            )


def write(path: Path, rows: Iterable[LabelledTrajectory]) -> int:
    """Write trajectories as TRL rows; observations are appended to the step that caused them.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    InputError
        If a step has no label: TRL knows no masked step.
    """
    return write_rows(path, map(_object, rows))


def _object(row: LabelledTrajectory) -> dict[str, object]:
    """Write one trajectory as a row."""
    labels = row.labels.values[1:]
    if None in labels:
        raise InputError(
            f"{row.trajectory.trajectory_id}: step {labels.index(None)} has no label, and "
            "TRL's format has no place for that: leave the trajectory out"
        )
    steps = [step_text(step) for step in row.trajectory.steps]
    hard = all(label in (0.0, 1.0) for label in labels)
    return {
        "prompt": row.trajectory.task.prompt,
        "completions": steps,
        "labels": [bool(label) for label in labels] if hard else list(labels),
    }
