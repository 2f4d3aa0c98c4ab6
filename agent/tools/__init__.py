"""Tools an agent can be given, by name."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

from agent.sandbox import SandboxProvider
from agent.tools.base import Tool, schema
from agent.tools.blocks import BlocksTool, initial_blocks
from agent.tools.calculator import CalculatorTool
from agent.tools.countdown import CountdownTool, initial_numbers
from agent.tools.python import PythonTool
from agent.tools.sql import SqlTool
from agent.tools.sql_database import check_database
from trajectory.errors import InputError
from trajectory.records import Task


def _calculator(sandbox: SandboxProvider) -> Tool:
    """Make the calculator, which runs nothing."""
    return CalculatorTool()


def _blocks(sandbox: SandboxProvider) -> Tool:
    """Make the blocks, which run nothing."""
    return BlocksTool()


def _countdown(sandbox: SandboxProvider) -> Tool:
    """Make the countdown, which runs nothing."""
    return CountdownTool()


def _python(sandbox: SandboxProvider) -> Tool:
    """Make the Python tool."""
    return PythonTool(sandbox())


def _sql(sandbox: SandboxProvider) -> Tool:
    """Make the SQL tool."""
    return SqlTool(sandbox())


TOOLS: dict[str, Callable[[SandboxProvider], Tool]] = {
    "blocks": _blocks,
    "calculator": _calculator,
    "countdown": _countdown,
    "python": _python,
    "sql": _sql,
}
"""Tool makers by name; those that run code ask the argument for the sandbox."""

TASK_CHECKS: dict[str, Callable[[Task], object]] = {
    "blocks": initial_blocks,
    "countdown": initial_numbers,
    "sql": check_database,
}
"""By tool: raises InputError for a task the tool cannot work on. Tools without a row take any."""


def build_tools(names: Sequence[str], sandbox: SandboxProvider | None = None) -> tuple[Tool, ...]:
    """Make the named tools, in the order given.

    Parameters
    ----------
    names : sequence of str
        Rows of `TOOLS`.
    sandbox : SandboxProvider, optional
        Where tools that run code run it; the caller closes it. Default: the strongest backend
        of this machine.

    Raises
    ------
    InputError
        If a name is unknown or given twice, or the sandbox a tool needs cannot be had.
    """
    for name in names:
        if name not in TOOLS:
            raise InputError(f"unknown tool {name!r}; valid names: {', '.join(sorted(TOOLS))}")
    if len(set(names)) != len(names):
        raise InputError(f"a tool is named twice in {', '.join(names)}; name each once")
    provider = sandbox or SandboxProvider()
    return tuple(TOOLS[name](provider) for name in names)


def check_tasks(names: Sequence[str], tasks: Iterable[Task]) -> None:
    """Refuse tasks that one of the named tools cannot work on, before any episode starts.

    Raises
    ------
    InputError
        If a task lacks what a tool needs.
    """
    checks = [TASK_CHECKS[name] for name in names if name in TASK_CHECKS]
    for task in tasks if checks else ():
        for check in checks:
            check(task)


def tool_schemas(names: Sequence[str]) -> tuple[Tool, ...]:
    """Make the named tools for their schemas alone: nothing is run, so no isolation is needed."""
    return build_tools(names, SandboxProvider("unsafe", allow_unsafe=True))


def tools_hash(tools: Sequence[Tool]) -> str:
    """Return 16 hex digits that identify the tools' schemas and their order.

    Examples
    --------
    >>> tools_hash(()) == tools_hash(build_tools(["calculator"]))
    False
    """
    schemas = json.dumps([schema(tool) for tool in tools], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(schemas.encode()).hexdigest()[:16]
