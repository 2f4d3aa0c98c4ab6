"""Math-Shepherd: a solution whose steps end in the tag ``ки``, and the same text with + and -.

Source of the form: Wang et al., arXiv:2312.08935, data set peiyi9979/Math-Shepherd. ``input`` is
the question, then ``Step 1: ... ки`` and so on; ``label`` is the same text with every tag replaced
by ``+`` (some continuation from here was right) or ``-``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory, Task
from trajectory.step_formats.rated import RatedTrajectory, step_text, text_trajectory
from trajectory.step_formats.rows import data_files, problem_id, read_rows, stem, write_rows

NAME = "math_shepherd"
TAG = "ки"
_FIRST_STEP = re.compile(r"\s*\bStep 1\s*:")


class Row(BaseModel):
    """One row."""

    input: str
    label: str
    task: str = ""


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows ``{input, label, task}``.

    Raises
    ------
    InputError
        If the two texts differ in more than the tags, or there is no step; names file and line.
    """
    for file in data_files(path):
        for number, (place, row) in enumerate(read_rows(file, Row), start=1):
            question, steps = _split(row.input, place)
            labels = _labels(row, place)
            yield RatedTrajectory(
                trajectory=text_trajectory(
                    trajectory_id=f"{stem(file)}/{number}",
                    task=Task(
                        task_id=problem_id(question), domain="text", prompt=question, answer=""
                    ),
                    steps=steps,
                    task_name=row.task,
                ),
                ratings=tuple(labels),
                source=NAME,
                place=place,
            )


def _split(text: str, place: str) -> tuple[str, list[str]]:
    """Part the question from the steps."""
    parts = text.split(TAG)
    found = _FIRST_STEP.search(parts[0])
    if len(parts) < 2 or found is None:
        raise InputError(f"{place}: input holds no 'Step 1: ... {TAG}': no step to label")
    if parts[-1].strip():
        raise InputError(f"{place}: input goes on after the last tag {TAG}: the step has no label")
    question, first = parts[0][: found.start()], parts[0][found.start() :]
    return question.strip(), [step.strip() for step in (first, *parts[1:-1])]


def _labels(row: Row, place: str) -> list[float]:
    """Read the marks at the places of the tags, walking both texts at once."""
    labels: list[float] = []
    at = 0
    for part in row.input.split(TAG)[:-1]:
        mark = row.label[at + len(part) : at + len(part) + 1]
        if row.label[at : at + len(part)] != part or mark not in ("+", "-"):
            raise InputError(
                f"{place}: label is not the text of input with + or - in place of tag "
                f"{len(labels) + 1}"
            )
        labels.append(1.0 if mark == "+" else 0.0)
        at += len(part) + 1
    return labels


def write(path: Path, rows: Iterable[LabelledTrajectory]) -> int:
    """Write trajectories as Math-Shepherd rows, labels of at least one half as ``+``.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    InputError
        If a step has no label, or a text holds the tag.
    """
    return write_rows(path, map(_object, rows))


def _object(row: LabelledTrajectory) -> dict[str, object]:
    """Write one trajectory as a row."""
    name, labels = row.trajectory.trajectory_id, row.labels.values[1:]
    if None in labels:
        raise InputError(f"{name}: step {labels.index(None)} has no label")
    texts = [step_text(step) for step in row.trajectory.steps]
    if any(TAG in text for text in (row.trajectory.task.prompt, *texts)):
        raise InputError(f"{name}: its text holds the tag {TAG}: it cannot be written so")
    numbered = [
        text if re.match(rf"Step {n}\s*:", text) else f"Step {n}: {text}"
        for n, text in enumerate(texts, start=1)
    ]
    marks = ["+" if (label or 0.0) >= 0.5 else "-" for label in labels]
    prompt = row.trajectory.task.prompt
    return {
        "input": prompt + " " + "\n".join(f"{text} {TAG}" for text in numbered),
        "label": prompt
        + " "
        + "\n".join(f"{text} {m}" for text, m in zip(numbered, marks, strict=True)),
        "task": row.trajectory.task.domain,
    }
