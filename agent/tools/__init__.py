"""Tools an agent can be given, by name."""

import hashlib
import json
from collections.abc import Callable, Sequence

from agent.sandbox import SandboxProvider
from agent.tools.base import Tool, schema
from agent.tools.calculator import CalculatorTool
from agent.tools.python import PythonTool
from trajectory.errors import InputError


def _calculator(sandbox: SandboxProvider) -> Tool:
    """Make the calculator, which runs nothing."""
    return CalculatorTool()


def _python(sandbox: SandboxProvider) -> Tool:
    """Make the Python tool."""
    return PythonTool(sandbox())


TOOLS: dict[str, Callable[[SandboxProvider], Tool]] = {
    "calculator": _calculator,
    "python": _python,
}
"""Tool makers by name; those that run code ask the argument for the sandbox."""


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
