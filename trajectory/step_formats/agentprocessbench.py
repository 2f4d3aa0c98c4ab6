"""AgentProcessBench: tool-use conversations with human labels per assistant message.

arXiv:2603.14465. The keys of ``step_labels`` are 0-based indices of *messages*; the labels are 1
(good), 0 (neutral), -1 (harmful). An assistant message is one step. What the user says later on is
an observation, of a call ``respond``, the name tau-bench gives the action of talking to the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, Field, JsonValue

from trajectory.errors import InputError
from trajectory.formats import from_messages
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory
from trajectory.step_formats.rated import RatedTrajectory, Rating
from trajectory.step_formats.rows import data_files, problem_id, read_rows

NAME = "agentprocessbench"

_RATINGS: dict[int, Rating] = {-1: 0.0, 0: "neutral", 1: 1.0}


class Row(BaseModel):
    """One row."""

    data_source: str
    query_index: int
    sample_index: int
    question: str = ""
    messages: list[dict[str, JsonValue]] = Field(default_factory=list)
    step_labels: dict[int, int]
    final_label: int


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read rows; ``meta`` of a trajectory holds its ``final_label``.

    Raises
    ------
    InputError
        If a row is malformed, holds labels only, or its labels do not stand at its assistant
        messages; names file and line.
    """
    for file in data_files(path):
        for place, row in read_rows(file, Row):
            if not row.messages:
                raise InputError(
                    f"{place}: labels without messages: nothing to read the steps from"
                )
            trajectory = Trajectory(
                trajectory_id=f"{row.data_source}/{row.query_index}/{row.sample_index}",
                task=Task(
                    task_id=problem_id(row.question),
                    domain=row.data_source,
                    prompt=row.question,
                    answer="",
                ),
                steps=tuple(_steps(row.messages, place)),
                stop=StopReason.MAX_STEPS,
                meta={"final_label": row.final_label},
            )
            yield RatedTrajectory(
                trajectory=trajectory, ratings=_ratings(row, place), source=NAME, place=place
            )


def _ratings(row: Row, place: str) -> tuple[Rating, ...]:
    """Return the rating of every assistant message, in order."""
    assistant = [n for n, m in enumerate(row.messages) if m.get("role") == "assistant"]
    if sorted(row.step_labels) != assistant:
        raise InputError(
            f"{place}: step_labels stand at messages {sorted(row.step_labels)}, the assistant's "
            f"are {assistant}: every assistant message needs one"
        )
    strange = set(row.step_labels.values()) - set(_RATINGS)
    if strange:
        raise InputError(f"{place}: step_labels hold {min(strange)}: they are -1, 0 or 1")
    return tuple(_RATINGS[row.step_labels[n]] for n in assistant)


def _steps(messages: Sequence[Mapping[str, JsonValue]], place: str) -> Iterator[Step]:
    """Yield the steps; a later user message becomes the observation of ``respond``."""
    first = next((n for n, m in enumerate(messages) if m.get("role") == "assistant"), 0)
    start = 0
    later = [n for n, m in enumerate(messages) if n > first and m.get("role") == "user"]
    for end in (*later, len(messages)):
        part = messages[start:end]
        try:
            steps = from_messages(
                part,
                trajectory_id=place,
                task=Task(task_id=place, domain="", prompt="", answer=""),
            ).steps
        except ValueError as error:
            raise InputError(f"{place}: after message {start}: {error}") from error
        yield from steps[:-1]
        if end == len(messages):
            yield from steps[-1:]
        elif steps:
            said = messages[end].get("content")
            yield replace(
                steps[-1],
                calls=(*steps[-1].calls, ToolCall(name="respond", arguments="{}")),
                observations=(*steps[-1].observations, Observation(content=str(said or ""))),
            )
        start = end + 1
