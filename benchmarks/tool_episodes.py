"""Real tool-use episodes for the speed benchmarks: InterCode-SQL runs, with their own lengths."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

from trajectory.errors import InputError
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory


def read_episodes(
    path: Path, count: int, *, seed: int, turns: int | None = None, max_chars: int = 4000
) -> list[Trajectory]:
    """Draw episodes at random from a file of InterCode runs.

    Parameters
    ----------
    path : Path
        ``sql_runs.jsonl.gz``.
    count : int
        How many.
    seed : int
        Of the draw.
    turns : int, optional
        Only episodes of so many turns.
    max_chars : int, default=4000
        Longer episodes are left out, so that memory is bounded (5 % of InterCode-SQL).

    Raises
    ------
    InputError
        If the file is missing or holds fewer.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give InterCode's sql_runs.jsonl.gz with --runs")
    rows = [r for r in _rows(path) if turns is None or len(r["turns"]) == turns]
    fitting = [e for e in map(_episode, rows) if _length(e) <= max_chars]
    if len(fitting) < count:
        raise InputError(f"{path} holds {len(fitting)} such episodes, {count} are asked for")
    return random.Random(seed).sample(fitting, count)  # noqa: S311 - not security


def _rows(path: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    """Read the lines of the file."""
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


def _episode(row: dict) -> Trajectory:  # type: ignore[type-arg]
    """Make a trajectory of a run."""
    steps = [
        Step(
            text=str(turn["action"]),
            calls=(ToolCall(name="sql", arguments="{}"),),
            observations=(Observation(content=str(turn["observation"])),),
        )
        for turn in row["turns"]
    ]
    reward = float(row["turns"][-1]["reward"] or 0.0) if row["turns"] else 0.0
    return Trajectory(
        trajectory_id=f"{row['model']}/{row['run']}",
        task=Task(task_id=str(row["task_id"]), domain="sql", prompt=row["query"], answer=""),
        steps=tuple(steps),
        stop=StopReason.ANSWERED,
        outcome=float(reward == 1.0),
    )


def _length(episode: Trajectory) -> int:
    """Count the characters of an episode."""
    texts = (s.text + "".join(o.content for o in s.observations) for s in episode.steps)
    return len(episode.task.prompt) + sum(map(len, texts))
