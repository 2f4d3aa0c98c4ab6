"""Keeps the restored tool states of the trajectories that are being continued."""

from __future__ import annotations

from agent.episode import Agent, Prefix
from agent.restore import RestoredTools
from agent.tools.base import SideEffect


class Branches:
    """Restored tool states by trajectory, released task by task.

    Parameters
    ----------
    agent : Agent
        Whose tools they are; without a tool that has a state there is nothing to keep.
    """

    def __init__(self, agent: Agent) -> None:
        self._needed = any(tool.effect is not SideEffect.PURE for tool in agent.tools)
        self._kept: dict[str, dict[str, RestoredTools]] = {}
        self._dropped: list[RestoredTools] = []

    def of(self, start: Prefix) -> RestoredTools | None:
        """Return the states of a trajectory; None if no tool has any."""
        if not self._needed:
            return None
        trajectory = start.trajectory
        kept = self._kept.setdefault(trajectory.task.task_id, {})
        if trajectory.trajectory_id not in kept:
            kept[trajectory.trajectory_id] = RestoredTools(trajectory)
        return kept[trajectory.trajectory_id]

    def drop(self, task_id: str) -> None:
        """Give up a task's states; `close_dropped` releases them."""
        self._dropped += self._kept.pop(task_id, {}).values()

    async def close_dropped(self) -> None:
        """Release what was given up."""
        while self._dropped:
            await self._dropped.pop().close()

    async def close(self) -> None:
        """Release everything."""
        for task_id in list(self._kept):
            self.drop(task_id)
        await self.close_dropped()
