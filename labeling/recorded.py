"""Tools that change the world, answered from the record instead of being called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.restore import call_arguments
from agent.tools.base import SideEffect, Tool, ToolFailure
from labeling.states import canonical_arguments
from trajectory.records import JsonValue, Observation, Task, Trajectory

Recordings = Mapping[tuple[str, str], Observation]
"""By task id and canonical arguments: the first observation that a call was answered with."""


def recordings(trajectories: Iterable[Trajectory], tool: str) -> Recordings:
    """Collect what the calls of one tool were answered with in recorded trajectories."""
    found: dict[tuple[str, str], Observation] = {}
    for trajectory in trajectories:
        for step in trajectory.steps:
            for call, observation in zip(step.calls, step.observations, strict=True):
                if call.name == tool and observation.error != "unknown_tool":
                    key = (trajectory.task.task_id, canonical_arguments(call_arguments(call)))
                    found.setdefault(key, observation)
    return found


class RecordedTool:
    """Stands in for a tool: answers calls that were recorded for the task, and breaks on others.

    A rollout that makes a call nobody recorded ends as a tool failure, so it counts for nothing.
    What is measured is thus the value among rollouts that stay within the record, which is less
    than a true rollout tells; it is all that can be had without changing the world again.

    Parameters
    ----------
    tool : Tool
        The tool that is not called.
    recorded : Recordings
        Its answers.
    """

    effect = SideEffect.PURE

    def __init__(self, tool: Tool, recorded: Recordings) -> None:
        self.name = tool.name
        self.description = tool.description
        self.parameters = tool.parameters
        self._recorded = recorded

    async def open(self, task: Task, seed: int) -> RecordedSession:
        """Begin a session; it has no state."""
        return RecordedSession(self.name, task.task_id, self._recorded)


class RecordedSession:
    """The record of one task."""

    def __init__(self, tool: str, task_id: str, recorded: Recordings) -> None:
        self._tool, self._task_id, self._recorded = tool, task_id, recorded

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Answer from the record.

        Raises
        ------
        ToolFailure
            If no such call was recorded for the task.
        """
        found = self._recorded.get((self._task_id, canonical_arguments(arguments)))
        if found is None:
            raise ToolFailure(
                f"no call of {self._tool} with these arguments was recorded for the task"
            )
        return found

    async def branch(self) -> RecordedSession:
        """Return another session."""
        return RecordedSession(self._tool, self._task_id, self._recorded)

    async def close(self) -> None:
        """Do nothing: nothing is held."""
