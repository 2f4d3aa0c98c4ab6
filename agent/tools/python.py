"""The `python` tool: a notebook whose state lasts over the turns of an episode."""

from __future__ import annotations

from collections.abc import Mapping

from agent.sandbox.base import Limits, ReplayDiverged, Result, Sandbox, SandboxError, Session
from agent.tools.arguments import text_argument, text_schema, unfenced
from agent.tools.base import ReplayMismatch, SideEffect, ToolFailure
from trajectory.records import JsonValue, Observation, Task


class PythonSession:
    """A sandbox session that speaks in observations."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self._session, self._limits = session, limits

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Run ``code`` in the present state.

        Raises
        ------
        ReplayMismatch
            If the present state had to be rebuilt and came out differently.
        ToolFailure
            If the sandbox broke.
        """
        code = text_argument(arguments, "code")
        if isinstance(code, Observation):
            return code
        try:
            result = await self._session.run(unfenced(code))
        except ReplayDiverged as error:
            raise ReplayMismatch(str(error)) from error
        except SandboxError as error:
            raise ToolFailure(f"the python sandbox broke: {error}") from error
        return Observation(
            content=observation_text(result, self._limits),
            error=result.error,
            seconds=result.wall_s,
        )

    async def branch(self) -> PythonSession:
        """Copy the present state into a session that shares nothing with this one."""
        try:
            return PythonSession(await self._session.branch(), self._limits)
        except ReplayDiverged as error:
            raise ReplayMismatch(str(error)) from error
        except SandboxError as error:
            raise ToolFailure(f"the python sandbox broke: {error}") from error

    async def close(self) -> None:
        """End the sandbox session."""
        await self._session.close()


class PythonTool:
    """Runs Python code in a sandbox.

    Parameters
    ----------
    sandbox : Sandbox
        Where the code runs.
    limits : Limits, optional
        Bounds of every call.
    """

    def __init__(self, sandbox: Sandbox, *, limits: Limits | None = None) -> None:
        self.name = "python"
        self.description = (
            "Run Python code in a notebook: variables stay defined between calls. Returns what "
            "the code prints and the value of its last expression."
        )
        self.parameters: Mapping[str, JsonValue] = text_schema("code", "The Python code to run.")
        self.effect = SideEffect.STATEFUL
        self.isolation = sandbox.isolation
        self._sandbox = sandbox
        self._limits = limits or Limits()

    async def open(self, task: Task, seed: int) -> PythonSession:
        """Begin an empty notebook; ``seed`` fixes string hashing, ``random`` and numpy."""
        try:
            return PythonSession(await self._sandbox.open(self._limits, seed), self._limits)
        except SandboxError as error:
            raise ToolFailure(f"the python sandbox broke: {error}") from error


def observation_text(result: Result, limits: Limits) -> str:
    """Write a result as the model reads it: output, errors, then what a limit did.

    Examples
    --------
    >>> rest = {"node": 0, "source": "kernel", "stderr": "", "wall_s": 6.0}
    >>> result = Result(status="timeout", stdout="1", error="timeout", cpu_s=5.0, **rest)
    >>> print(observation_text(result, Limits()))
    1
    [timed out: 5 s of CPU time. Variables are as before this call.]
    """
    over_wall = result.wall_s >= limits.wall_s  # the clock of the CPU may stop just below its limit
    limit = f"{limits.wall_s:g} s" if over_wall else f"{limits.cpu_s:g} s of CPU time"
    notes = {
        "timeout": f"timed out: {limit}",
        "crash": "the interpreter died",
        "output_limit": "stopped: too much output",
    }
    parts = [result.stdout.rstrip("\n"), result.stderr.rstrip("\n")]
    if result.status in notes:
        parts.append(f"[{notes[result.status]}. Variables are as before this call.]")
    text = "\n".join(part for part in parts if part)
    return text or "(no output; use print to see a value)"
