"""Tools an agent can be given, by name."""

import hashlib
import json
from collections.abc import Callable, Sequence

from agent.sandbox import build_sandbox
from agent.tools.base import Tool, schema
from agent.tools.calculator import CalculatorTool
from agent.tools.python import PythonTool
from trajectory.errors import InputError


def _calculator(allow_unsafe: bool) -> Tool:
    """Make the calculator, which runs nothing."""
    return CalculatorTool()


def _python(allow_unsafe: bool) -> Tool:
    """Make the Python tool in the sandbox this machine offers."""
    return PythonTool(build_sandbox("unsafe", allow_unsafe=allow_unsafe))


TOOLS: dict[str, Callable[[bool], Tool]] = {"calculator": _calculator, "python": _python}
"""Tool makers by name; the argument says whether the user accepts missing isolation."""


def build_tools(names: Sequence[str], *, allow_unsafe: bool) -> tuple[Tool, ...]:
    """Make the named tools, in the order given.

    Raises
    ------
    InputError
        If a name is unknown or given twice, or a tool needs isolation that is not there and
        ``allow_unsafe`` is False.
    """
    for name in names:
        if name not in TOOLS:
            raise InputError(f"unknown tool {name!r}; valid names: {', '.join(sorted(TOOLS))}")
    if len(set(names)) != len(names):
        raise InputError(f"a tool is named twice in {', '.join(names)}; name each once")
    return tuple(TOOLS[name](allow_unsafe) for name in names)


def tools_hash(tools: Sequence[Tool]) -> str:
    """Return 16 hex digits that identify the tools' schemas and their order.

    Examples
    --------
    >>> tools_hash(()) == tools_hash(build_tools(["calculator"], allow_unsafe=False))
    False
    """
    schemas = json.dumps([schema(tool) for tool in tools], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(schemas.encode()).hexdigest()[:16]
