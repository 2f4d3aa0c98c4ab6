"""ProcessBench: solutions with the 0-based index of the first wrong step, -1 for none.

Zheng et al., arXiv:2412.06559. Steps before the index are right, the step at the index is wrong,
and nothing is said of the steps after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, Field

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory, Task
from trajectory.step_formats.rated import RatedTrajectory, Rating, step_text, text_trajectory
from trajectory.step_formats.rows import data_files, problem_id, read_rows, stem, write_rows

NAME = "processbench"


class Row(BaseModel):
    """One row."""

    id: str
    generator: str = ""
    problem: str
    steps: list[str] = Field(min_length=1)
    final_answer_correct: bool
    label: int


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows; ``meta`` of a trajectory holds its ``subset`` (the file's name) and ``label``.

    Raises
    ------
    InputError
        If a row is malformed or its label names no step; names file and line.
    """
    for file in data_files(path):
        for place, row in read_rows(file, Row):
            if not -1 <= row.label < len(row.steps):
                raise InputError(
                    f"{place}: label {row.label} names none of the {len(row.steps)} steps: it is "
                    "the 0-based index of the first wrong step, or -1"
                )
            trajectory = text_trajectory(
                trajectory_id=row.id,
                task=Task(
                    task_id=problem_id(row.problem), domain="math", prompt=row.problem, answer=""
                ),
                steps=row.steps,
                policy=row.generator,
                subset=stem(file),
                label=row.label,
                final_answer_correct=row.final_answer_correct,
            )
            yield RatedTrajectory(
                trajectory=trajectory,
                ratings=step_ratings(row.label, len(row.steps)),
                source=NAME,
                place=place,
            )


def step_ratings(label: int, num_steps: int) -> tuple[Rating, ...]:
    """Turn the index of the first wrong step into ratings.

    Examples
    --------
    >>> step_ratings(1, 4)
    (1.0, 0.0, None, None)
    >>> step_ratings(-1, 2)
    (1.0, 1.0)
    """
    if label < 0:
        return (1.0,) * num_steps
    return (*(1.0,) * label, 0.0, *(None,) * (num_steps - label - 1))


def write(path: Path, rows: Iterable[LabelledTrajectory]) -> int:
    """Write trajectories as ProcessBench rows; the first label under one half is the error.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    InputError
        If a label is missing before the first wrong step: the index is then not known.
    """
    return write_rows(path, map(_object, rows))


def _object(row: LabelledTrajectory) -> dict[str, object]:
    """Write one trajectory as a row."""
    trajectory, labels = row.trajectory, row.labels.values[1:]
    wrong = [n for n, label in enumerate(labels) if label is not None and label < 0.5]
    first = wrong[0] if wrong else -1
    checked = labels[:first] if wrong else labels
    if None in checked:
        raise InputError(
            f"{trajectory.trajectory_id}: step {checked.index(None)} has no label, so the "
            "first wrong step is not known"
        )
    known = trajectory.meta.get("final_answer_correct")
    verdict = known if isinstance(known, bool) else (trajectory.outcome or 0.0) >= 0.5
    return {
        "id": trajectory.trajectory_id,
        "generator": trajectory.policy,
        "problem": trajectory.task.prompt,
        "steps": [step_text(step) for step in trajectory.steps],
        "final_answer_correct": verdict,
        "label": first,
    }
