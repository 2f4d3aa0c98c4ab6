"""``python -m benchmarks branching``: restoring a tool state by branching, beside replaying it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from agent.restore import RestoredTools, replay, tool_seed
from agent.sandbox import AUTO, SandboxProvider
from agent.tools import build_tools
from agent.tools.base import Tool, ToolSession
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import Step, StopReason, Task, ToolCall, Trajectory

_CELLS = {
    "plain": ("x{n} = {n} + sum(range(1000))", "print(x{n})"),
    "sympy": ("import sympy", "x{n} = sympy.Integer({n}) + sympy.sqrt(8)", "print(x{n})"),
}


@dataclass(frozen=True, kw_only=True)
class BranchingConfig:
    """Time both ways to come to the state after several calls of the python tool."""

    sandbox: str = AUTO
    """Backend."""
    repeats: int = 30
    """Restorations of each kind and length; medians are shown."""
    most_calls: int = 6
    """Longest prefix, calls."""
    out: Path | None = None
    """JSON file for the numbers."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.most_calls < 1:
            raise InputError("--repeats and --most-calls must be >= 1")


def branching(config: BranchingConfig) -> list[dict[str, object]]:
    """Measure, print the table, and write the file if one was asked for.

    Returns
    -------
    list of dict
        Per kind of cell and number of calls: ``replay_ms`` and ``branch_ms``, medians, of opening
        a session in the state, one call in it (a branch is made at its first) and closing it.
    """
    rows = asyncio.run(_measure(config))
    table = Table("cells", "calls", "replay, ms", "branch, ms", "ratio")
    for row in rows:
        replayed, branched = float(str(row["replay_ms"])), float(str(row["branch_ms"]))
        table.add_row(
            str(row["cells"]),
            str(row["calls"]),
            f"{replayed:.1f}",
            f"{branched:.1f}",
            f"{replayed / branched:.1f}",
        )
    Console().print(table)
    if config.out is not None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


async def _measure(config: BranchingConfig) -> list[dict[str, object]]:
    """Time every kind and length."""
    sandbox = SandboxProvider(config.sandbox)
    (tool,) = build_tools(["python"], sandbox)
    rows: list[dict[str, object]] = []
    try:
        for kind, lines in _CELLS.items():
            recorded = await _record(tool, "\n".join(lines), config.most_calls)
            restored = RestoredTools(recorded)
            for calls in range(1, config.most_calls + 1):
                replaying = partial(_replayed, tool, recorded, calls)
                branched = partial(restored.open, tool, calls)
                row: dict[str, object] = {"cells": kind, "calls": calls}
                row["replay_ms"] = await _median_ms(config.repeats, replaying)
                row["branch_ms"] = await _median_ms(config.repeats, branched)
                rows.append(row)
            await restored.close()
    finally:
        await sandbox.close()
    return rows


async def _record(tool: Tool, cell: str, count: int) -> Trajectory:
    """Run the cells once and keep what they said."""
    task = Task(task_id="t", domain="jsonl", prompt="?", answer="")
    session = await tool.open(task, tool_seed(tool, 0))
    steps = []
    for n in range(count):
        arguments = {"code": cell.format(n=n)}
        observation = await session.call(arguments)
        call = ToolCall(name=tool.name, arguments=json.dumps(arguments))
        steps.append(Step(text="", calls=(call,), observations=(observation,)))
    await session.close()
    return Trajectory(trajectory_id="t/0", task=task, steps=tuple(steps), stop=StopReason.MAX_STEPS)


async def _replayed(tool: Tool, recorded: Trajectory, calls: int) -> ToolSession:
    """Open a session and repeat the calls."""
    session = await tool.open(recorded.task, tool_seed(tool, 0))
    await replay(session, tool.name, recorded.steps[:calls])
    return session


async def _median_ms(repeats: int, make: Callable[[], Awaitable[ToolSession]]) -> float:
    """Time making, using and closing a session, without the first, which may restore a state."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        session = await make()
        await session.call({"code": "1"})
        await session.close()
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[1:])
