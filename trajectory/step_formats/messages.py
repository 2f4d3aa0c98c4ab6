"""OpenAI-style messages with a verdict: of every assistant message, as counts, or of the whole.

A row is ``{"messages": [...]}`` with ``labels`` (one per assistant message, in [0, 1] or null),
or ``rollouts`` and ``correct`` (one more than assistant messages: the prompt comes first), or
``outcome`` alone, which then is one rollout from every prefix. ``id`` and ``task_id`` are optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, JsonValue, model_validator

from trajectory.errors import InputError
from trajectory.formats import from_messages, to_messages
from trajectory.records import LabelledTrajectory, Task
from trajectory.step_formats.rated import RatedTrajectory, Rating
from trajectory.step_formats.rows import data_files, problem_id, read_rows, stem, write_rows

NAME = "messages"


class Row(BaseModel):
    """One conversation."""

    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    labels: list[float | None] | None = None
    rollouts: list[Annotated[int, Field(ge=0)]] | None = None
    correct: list[Annotated[int, Field(ge=0)]] | None = None
    outcome: float | None = Field(default=None, ge=0, le=1)
    id: str | None = None
    task_id: str | None = None

    @model_validator(mode="after")
    def _some_verdict(self) -> Row:
        if (self.rollouts is None) != (self.correct is None):
            raise ValueError("rollouts and correct go together")
        rated = self.labels is not None and any(label is not None for label in self.labels)
        if not rated and self.rollouts is None and self.outcome is None:
            raise ValueError("the row has no label: give labels, rollouts and correct, or outcome")
        return self


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read conversations.

    Raises
    ------
    InputError
        If a row is malformed or has no verdict; names file and line.
    """
    for file in data_files(path):
        for number, (place, row) in enumerate(read_rows(file, Row), start=1):
            prompt = _prompt(row, place)
            task_id = row.task_id or problem_id(prompt)
            try:
                trajectory = from_messages(
                    row.messages,
                    trajectory_id=row.id or f"{stem(file)}/{number}",
                    task=Task(task_id=task_id, domain="messages", prompt=prompt, answer=""),
                    outcome=row.outcome,
                )
            except ValueError as error:
                raise InputError(f"{place}: {error}") from error
            size = trajectory.num_steps + 1
            rollouts, correct = row.rollouts or [], row.correct or []
            if row.outcome is not None and not rollouts and row.labels is None:
                rollouts, correct = [1] * size, [int(row.outcome >= 0.5)] * size
            ratings: list[Rating] = (
                [None] * trajectory.num_steps if row.labels is None else list(row.labels)
            )
            yield RatedTrajectory(
                trajectory=trajectory,
                ratings=tuple(ratings),
                rollouts=tuple(rollouts),
                correct=tuple(correct),
                completer=trajectory.trajectory_id,
                source=NAME,
                place=place,
            )


def _prompt(row: Row, place: str) -> str:
    """Return the text of the user's message."""
    for message in row.messages:
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return str(message["content"])
    raise InputError(f"{place}: messages hold no user message with text: there is no task")


def write(path: Path, rows: Iterable[LabelledTrajectory]) -> int:
    """Write trajectories as conversations with their counts, or their labels where they have none.

    Returns
    -------
    int
        Rows written.
    """
    return write_rows(path, map(_object, rows))


def _object(row: LabelledTrajectory) -> dict[str, object]:
    """Write one trajectory as a row."""
    obj: dict[str, object] = {
        "id": row.trajectory.trajectory_id,
        "task_id": row.trajectory.task.task_id,
        "messages": to_messages(row.trajectory),
        "outcome": row.trajectory.outcome,
    }
    if any(row.evidence.rollouts):
        pairs = zip(row.evidence.rollouts, row.evidence.failed, strict=True)
        obj["rollouts"] = [n - f for n, f in pairs]
        obj["correct"] = list(row.evidence.correct)
    else:
        obj["labels"] = list(row.labels.values[1:])
    return obj
