"""Checking a call's arguments against the simple schemas tools declare."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trajectory.records import JsonValue, Observation

_FENCE = re.compile(r"\s*```[A-Za-z0-9]*[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)


def text_schema(name: str, description: str) -> dict[str, JsonValue]:
    """Return the JSON schema of an object with one required string."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": description}},
        "required": [name],
        "additionalProperties": False,
    }


def text_argument(arguments: Mapping[str, JsonValue], name: str) -> str | Observation:
    """Return the one string argument, or the observation that tells the model what is wrong.

    Examples
    --------
    >>> text_argument({"code": "1 + 1"}, "code")
    '1 + 1'
    >>> text_argument({"expr": "1 + 1"}, "code").content
    "Error: expected the argument 'code' (a string), got 'expr'."
    """
    value = arguments.get(name)
    if len(arguments) == 1 and isinstance(value, str):
        return value
    if len(arguments) == 1 and name in arguments:
        got = f"a value of type {type(value).__name__}"
    else:
        got = ", ".join(f"{key[:40]!r}" for key in list(arguments)[:8]) or "nothing"
    return Observation(
        content=f"Error: expected the argument {name!r} (a string), got {got}.",
        error="bad_arguments",
    )


class Refused(Exception):
    """A call that the state of a tool does not allow; ``problem`` names the class of mistake."""

    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(reason)
        self.problem = problem


def unfenced(code: str) -> str:
    r"""Return code without the Markdown fence that a model may have put around it.

    Examples
    --------
    >>> unfenced("```sql\nSELECT 1\n```")
    'SELECT 1'
    """
    fenced = _FENCE.fullmatch(code)
    return fenced[1] if fenced else code
