"""Restores the tool state of a trajectory's prefixes, by branching where that is possible."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from agent.tools.base import ReplayMismatch, SideEffect, Tool, ToolSession
from trajectory.records import JsonValue, Observation, Step, ToolCall, Trajectory
from trajectory.seeds import derive_seed


def call_arguments(call: ToolCall) -> dict[str, JsonValue]:
    """Read a call's arguments (the parser guarantees a JSON object)."""
    value = json.loads(call.arguments)
    return value if isinstance(value, dict) else {}


def tool_seed(tool: Tool, episode_seed: int) -> int:
    """Return the seed of a tool's session in the episode with this seed."""
    return derive_seed("tool", tool.name, episode_seed)


async def replay(session: ToolSession, tool: str, steps: Sequence[Step]) -> None:
    """Repeat the recorded calls of one tool and insist on the recorded results.

    Parameters
    ----------
    session : ToolSession
        In the state before the first of the steps.
    tool : str
        The tool's name.
    steps : sequence of Step
        Whose calls of the tool are repeated, in order.

    Raises
    ------
    ReplayMismatch
        If a call gives another text than the recorded one.
    ToolFailure
        If the tool breaks.
    """
    for step in steps:
        for call, recorded in zip(step.calls, step.observations, strict=True):
            if _reached(call, recorded, tool):
                repeated = await session.call(call_arguments(call))
                if repeated.content != recorded.content:
                    raise ReplayMismatch(
                        f"replay of {call.name} gave {repeated.content[:80]!r}, recorded was "
                        f"{recorded.content[:80]!r}"
                    )


def num_calls(tool: str, steps: Sequence[Step]) -> int:
    """Count the recorded calls that reached a tool."""
    return sum(
        _reached(call, recorded, tool)
        for step in steps
        for call, recorded in zip(step.calls, step.observations, strict=True)
    )


def _reached(call: ToolCall, recorded: Observation, tool: str) -> bool:
    """Tell whether a recorded call got through to the tool."""
    return call.name == tool and recorded.error != "unknown_tool"


class RestoredTools:
    """The tool states after the steps of one trajectory, each restored once and then branched.

    The state after step ``t`` is made from the nearest earlier one that is there by repeating the
    calls in between, checked against their record, so the calls of a trajectory are repeated once
    however many rollouts begin in it. States stay alive until `close`.

    Parameters
    ----------
    trajectory : Trajectory
        What is restored.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory
        self._states: dict[tuple[str, int], ToolSession] = {}
        self._mismatches: dict[str, tuple[int, ReplayMismatch]] = {}
        self._turn = asyncio.Lock()
        self._closed = False

    async def open(self, tool: Tool, steps: int) -> ToolSession:
        """Return a session of its own in the state after the first ``steps`` steps.

        Raises
        ------
        ReplayMismatch
            If the state cannot be restored as it was recorded.
        ToolFailure
            If the tool breaks.
        """
        past = self._trajectory.steps[:steps]
        if tool.effect is SideEffect.PURE or not num_calls(tool.name, past):
            return await tool.open(self._trajectory.task, tool_seed(tool, self._trajectory.seed))
        async with self._turn:
            state = self._states.get((tool.name, steps)) or await self._restore(tool, steps)
            return await state.branch()

    async def _restore(self, tool: Tool, steps: int) -> ToolSession:
        """Make the state after ``steps`` steps and keep it."""
        broken_at, mismatch = self._mismatches.get(tool.name, (steps + 1, None))
        if mismatch is not None and broken_at <= steps:
            raise ReplayMismatch(str(mismatch))
        known = [t for name, t in self._states if name == tool.name and t < steps]
        start = max(known, default=0)
        if start:
            session = await self._states[tool.name, start].branch()
        else:
            seed = tool_seed(tool, self._trajectory.seed)
            session = await tool.open(self._trajectory.task, seed)
        try:
            await replay(session, tool.name, self._trajectory.steps[start:steps])
            if self._closed:
                raise asyncio.CancelledError
        except BaseException as error:
            await session.close()
            if isinstance(error, ReplayMismatch):
                self._mismatches[tool.name] = (steps, error)
            raise
        self._states[tool.name, steps] = session
        return session

    async def close(self) -> None:
        """Release every state; may be called twice."""
        self._closed = True
        while self._states:
            _, session = self._states.popitem()
            await session.close()
