"""InterCode runs: per turn an action, what the environment answered, a reward, whether it ran.

Yang et al., arXiv:2306.14898. A run succeeded if some turn earned reward 1. Its success is one
rollout from every state it went through, with the model of the run as completer: that is a
Monte-Carlo estimate with K = 1, so the counts of a row are 1 for every prefix. Rewards are no part
of the trajectory's text: the environment's reward would give the outcome away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trajectory.errors import InputError
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory
from trajectory.step_formats.rated import RatedTrajectory
from trajectory.step_formats.rows import data_files, read_rows

NAME = "intercode"


class Turn(BaseModel):
    """One turn of a run."""

    model_config = ConfigDict(strict=True)

    action: str
    observation: str | None
    reward: float | None
    valid: bool | None
    thought: str | None = None


class Summary(BaseModel):
    """What InterCode says of a run as a whole."""

    max_reward: float | None = None
    final_reward: float | None = None


class Row(BaseModel):
    """One run."""

    run: str = Field(pattern=r"^ic_(sql|bash|ctf|python)_")
    model: str
    task_id: int
    query: str
    turns: list[Turn]
    summary: Summary
    file_system: int | None = None


def read(path: Path) -> Iterator[RatedTrajectory]:
    """Read runs; ``policy`` of a trajectory is the model, ``group`` the run's experiment.

    Raises
    ------
    InputError
        If a row is malformed, or no reward is known of it; names file and line.
    """
    for file in data_files(path):
        for place, row in read_rows(file, Row):
            environment = row.run.split("_")[1]
            system = "" if row.file_system is None else f"fs{row.file_system}-"
            task_id = f"intercode-{environment}-{system}{row.task_id}"
            success = _success(row, place)
            size = len(row.turns) + 1
            trajectory = Trajectory(
                trajectory_id=f"{task_id}/{row.run}",
                task=Task(
                    task_id=task_id,
                    domain=f"intercode-{environment}",
                    prompt=row.query,
                    answer="",
                ),
                steps=tuple(_step(turn, environment) for turn in row.turns),
                stop=StopReason.ANSWERED,
                outcome=success,
                group=row.run,
                policy=row.model,
                tools=(environment,),
            )
            yield RatedTrajectory(
                trajectory=trajectory,
                ratings=(None,) * len(row.turns),
                rollouts=(1,) * size,
                correct=(int(success),) * size,
                completer=row.run,
                source=NAME,
                place=place,
            )


def _success(row: Row, place: str) -> Literal[0, 1]:
    """Tell whether the run ever earned the full reward."""
    known = [turn.reward for turn in row.turns]
    known += [row.summary.max_reward, row.summary.final_reward]
    rewards = [reward for reward in known if reward is not None]
    if not rewards:
        raise InputError(f"{place}: neither a turn nor the summary has a reward: no outcome")
    return 1 if max(rewards) >= 1 else 0


def _step(turn: Turn, environment: str) -> Step:
    """Make a step; an action the environment refused or never ran has an error."""
    error = None
    if turn.observation is None:
        error = "not_run"
    elif turn.valid is False:
        error = "invalid_action"
    return Step(
        text=f"{turn.thought}\n{turn.action}" if turn.thought else turn.action,
        calls=(ToolCall(name=environment, arguments=json.dumps({"action": turn.action})),),
        observations=(Observation(content=turn.observation or "", error=error),),
    )
