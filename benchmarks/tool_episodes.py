"""Real tool-use episodes for the speed benchmarks: InterCode-SQL runs, with their own lengths."""

from __future__ import annotations

import random
from pathlib import Path

from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.step_formats import intercode


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
    episodes = (row.trajectory for row in intercode.read(path))
    fitting = [e for e in episodes if turns in (None, e.num_steps) and _length(e) <= max_chars]
    if len(fitting) < count:
        raise InputError(f"{path} holds {len(fitting)} such episodes, {count} are asked for")
    return random.Random(seed).sample(fitting, count)  # noqa: S311 - not security


def _length(episode: Trajectory) -> int:
    """Count the characters of an episode."""
    texts = (s.text + "".join(o.content for o in s.observations) for s in episode.steps)
    return len(episode.task.prompt) + sum(map(len, texts))
