"""Task domains, by name."""

from collections.abc import Callable, Mapping

from agent.sandbox import SandboxProvider
from agent.tasks.base import TaskDomain
from agent.tasks.jsonl import JsonlDomain
from agent.tasks.math import MathDomain
from trajectory.errors import InputError


def _options(text: str) -> Mapping[str, str]:
    """Parse ``name=value,name=value``."""
    options: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise InputError(f"{part!r} is no option: write name=value, separated by commas")
        if name.strip() in options:
            raise InputError(f"the option {name.strip()!r} is given twice")
        options[name.strip()] = value.strip()
    return options


def _arithmetic(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the generated word problems."""
    from agent.tasks.arithmetic import ArithmeticDomain

    return ArithmeticDomain.from_options(_options(rest))


def _math(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the mathematics problems of a file or data set."""
    if not rest:
        raise InputError("'math' needs a source: write math:FILE.jsonl or math:hf:OWNER/NAME")
    return MathDomain(rest)


def _jsonl(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the problems of any file."""
    if not rest:
        raise InputError("'jsonl' needs a file: write jsonl:FILE.jsonl or FILE.jsonl")
    return JsonlDomain(rest)


def _sql(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the questions about databases of a file."""
    from agent.tasks.sql import SqlDomain

    path, _, text = rest.partition(",")
    options = _options(text)
    thinned = options.get("thinned", "0")
    if not path or options.keys() - {"databases", "thinned"} or not thinned.isdecimal():
        raise InputError(
            "'sql' takes a file and two options: write sql:FILE.jsonl or "
            "sql:FILE.jsonl,databases=FOLDER,thinned=NUMBER"
        )
    databases = options.get("databases", "")
    return SqlDomain(path, sandbox, databases=databases, thinned=int(thinned))


def _code(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the programming problems of a file."""
    from agent.tasks.code import CodeDomain

    if not rest:
        raise InputError("'code' needs a file: write code:FILE.jsonl")
    return CodeDomain(rest, sandbox)


def _planning(rest: str, sandbox: SandboxProvider) -> TaskDomain:
    """Make the planning problems of a file."""
    from agent.tasks.planning import PlanningDomain

    kind, _, path = rest.partition(":")
    if not path:
        raise InputError(
            "'planning' needs a kind and a file: write planning:blocksworld:FILE.jsonl or "
            "planning:countdown:FILE.jsonl"
        )
    return PlanningDomain(kind, path)


DOMAINS: dict[str, Callable[[str, SandboxProvider], TaskDomain]] = {
    "arithmetic": _arithmetic,
    "code": _code,
    "math": _math,
    "jsonl": _jsonl,
    "planning": _planning,
    "sql": _sql,
}
"""Domain makers by name, given what follows ``name:`` in a specification and the sandbox for
checkers that run code."""


def parse_tasks(spec: str, sandbox: SandboxProvider | None = None) -> TaskDomain:
    """Make the domain a specification names.

    Parameters
    ----------
    spec : str
        ``arithmetic``, ``arithmetic:operations=2-6,distractors=1``, ``math:FILE.jsonl``,
        ``math:hf:OWNER/NAME``, ``code:FILE.jsonl``, ``planning:blocksworld:FILE.jsonl``,
        ``planning:countdown:FILE.jsonl``, ``sql:FILE.jsonl,databases=FOLDER``, or ``FILE.jsonl``.
    sandbox : SandboxProvider, optional
        Where checkers that run code run it; default: the strongest backend of this machine.

    Raises
    ------
    InputError
        If the name or an option is unknown, or a source is missing from the specification.

    Examples
    --------
    >>> parse_tasks("math:problems.jsonl").name, parse_tasks("problems.jsonl").name
    ('math', 'jsonl')
    """
    name, _, rest = spec.partition(":")
    if name in DOMAINS:
        return DOMAINS[name](rest, sandbox or SandboxProvider())
    if spec.endswith(".jsonl"):
        return JsonlDomain(spec)
    names = ", ".join(sorted(DOMAINS))
    raise InputError(f"unknown tasks {spec!r}; valid: {names} (as math:FILE.jsonl), or FILE.jsonl")
