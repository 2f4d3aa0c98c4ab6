"""What a tool is: a schema, a side-effect class, and sessions with branchable state.

A model's mistake (unknown tool, bad arguments, an exception in its code) is an `Observation` it
can read. Broken infrastructure raises `ToolFailure` and ends the episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from trajectory.records import JsonValue, Observation, Task


class ToolFailure(Exception):
    """A tool's infrastructure broke; the episode ends as ``TOOL_FAILURE``, without a verdict."""


class ReplayMismatch(ToolFailure):
    """A repeated call gave another result than the recorded one, so a state cannot be restored."""


class SideEffect(StrEnum):
    """What calling a tool may change."""

    PURE = "pure"
    """Nothing: the same call gives the same result at any time."""
    STATEFUL = "stateful"
    """Only its own session, whose state can be branched."""
    IRREVERSIBLE = "irreversible"
    """The world outside; labelling by re-execution is refused."""


class ToolSession(Protocol):
    """State of one tool within one episode."""

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Run the tool; bad arguments come back as an observation with ``error`` set.

        Raises
        ------
        ToolFailure
            If the infrastructure, not the call, is at fault.
        """
        ...

    async def branch(self) -> ToolSession:
        """Copy the present state into a session that shares nothing with this one."""
        ...

    async def close(self) -> None:
        """Release the session's resources; may be called twice."""
        ...


class Tool(Protocol):
    """A tool an agent can call."""

    name: str
    description: str
    parameters: Mapping[str, JsonValue]
    """JSON schema (type object) of the arguments."""
    effect: SideEffect

    async def open(self, task: Task, seed: int) -> ToolSession:
        """Begin a session for one episode on ``task``; ``seed`` fixes any randomness."""
        ...


def schema(tool: Tool) -> dict[str, JsonValue]:
    """Return the tool's OpenAI-style function schema, as chat templates expect it."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": dict(tool.parameters),
        },
    }
