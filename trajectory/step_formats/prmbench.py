"""PRMBench: solutions with errors put in; ``error_steps`` are 1-based.

Song et al., arXiv:2501.03124. Every step that is not an error step counts as right, also those
after an error. 100 of the public rows name an error step past the last step; such numbers name no
step, exactly as in the benchmark's own evaluation, and are counted in ``meta``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field

from trajectory.errors import InputError
from trajectory.records import Task
from trajectory.step_formats.rated import RatedTrajectory, text_trajectory
from trajectory.step_formats.rows import data_files, problem_id, read_rows

NAME = "prmbench"


class Row(BaseModel):
    """One row."""

    idx: str
    original_question: str
    modified_question: str
    modified_process: list[str] = Field(min_length=1)
    error_steps: list[int]
    classification: str


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows; ``meta`` of a trajectory holds its ``classification``.

    Raises
    ------
    InputError
        If a row is malformed or an error step is below 1; names file and line.
    """
    seen: dict[str, int] = {}
    for file in data_files(path):
        for place, row in read_rows(file, Row):
            if any(step < 1 for step in row.error_steps):
                raise InputError(f"{place}: error_steps {row.error_steps}: they count from 1")
            size, wrong = len(row.modified_process), set(row.error_steps)
            name = f"{row.classification}/{row.idx}"
            seen[name] = seen.get(name, 0) + 1
            trajectory = text_trajectory(
                trajectory_id=name if seen[name] == 1 else f"{name}#{seen[name]}",
                task=Task(
                    task_id=problem_id(row.original_question),
                    domain="math",
                    prompt=row.modified_question,
                    answer="",
                ),
                steps=row.modified_process,
                classification=row.classification,
                repeated=seen[name] > 1,
                error_steps_past_the_end=sum(step > size for step in wrong),
            )
            yield RatedTrajectory(
                trajectory=trajectory,
                ratings=tuple(0.0 if n in wrong else 1.0 for n in range(1, size + 1)),
                source=NAME,
                place=place,
            )
