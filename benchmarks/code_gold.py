"""``python -m benchmarks code-gold``: how well hidden tests tell right code from wrong.

Every gold solution is graded, which must give 1, and variants of it that cannot be right, which
must give 0.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.sandbox import AUTO, SandboxProvider
from agent.tasks import parse_tasks
from agent.tasks.base import Split, TaskDomain
from agent.tasks.code_tests import HiddenTests
from agent.tools.base import ToolFailure
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import Task

_NONE = "def {name}(*args, **kwargs):\n    return None\n"
_CHANGED = """\
_gold_{name} = {name}

def {name}(*args, **kwargs):
    value = _gold_{name}(*args, **kwargs)
    if value is None:
        return 0
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    for more in ("x", [None], (None,), b"x"):
        if isinstance(value, type(more)):
            return value + more
    return dict(value, more=1) if isinstance(value, dict) else {{*value, "more"}}
"""
_LIAR = """\
class Liar:
    def __getattr__(self, name):
        return lambda *args: True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
    __bool__ = lambda self: True
    __hash__ = __len__ = __int__ = __index__ = lambda self: 1
    __float__ = lambda self: 1.0

def {name}(*args, **kwargs):
    return Liar()
"""
_EXITS = "def {name}(*args, **kwargs):\n    import os\n    os._exit(0)\n"
VARIANTS = {
    "returns None": _NONE,
    "returns another value": _CHANGED,
    "returns what equals anything": _LIAR,
    "exits with code 0": _EXITS,
}
"""Code put behind the gold solution, by what it makes of a function."""


@dataclass(frozen=True, kw_only=True)
class CodeGoldConfig:
    """Grade every gold solution, and wrong variants of it."""

    tasks: str
    """Task source: code:FILE.jsonl in the format of HumanEval or MBPP."""
    split: Split = "test"
    """Which part of the source."""
    first_task: int = 0
    """Index of the first task used."""
    num_tasks: int | None = None
    """How many tasks; all when not given."""
    gold_only: bool = False
    """Leave the wrong variants out."""
    sandbox: str = AUTO
    """Where the code runs: auto (the strongest this machine offers) or a backend."""
    allow_unsafe_tools: bool = False
    """Accept a sandbox that runs code without isolation on this machine."""
    concurrency: int = 2
    """Solutions graded at a time."""
    out: Path | None = None
    """Write the counts and the ids of the rows that failed to this JSON file too."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InputError("--concurrency must be >= 1")


@dataclass(kw_only=True)
class CodeGoldReport:
    """What the checker said."""

    tasks: int = 0
    gold_wrong: list[str] = field(default_factory=list)
    """Tasks whose own gold solution was judged wrong."""
    accepted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Tasks where a wrong variant was judged right, by variant."""
    no_verdict: dict[str, str] = field(default_factory=dict)
    """Why there was none, by task."""


def check(config: CodeGoldConfig) -> CodeGoldReport:
    """Run the check and print its table.

    Raises
    ------
    InputError
        If the tasks are not of the domain ``code`` or cannot be read.
    """
    report = asyncio.run(_check(config))
    table = Table("submission", "right", "wrong", "should be", title=config.tasks)
    judged = report.tasks - len(report.no_verdict)
    wrong = len(report.gold_wrong)
    table.add_row("gold solution", str(judged - wrong), str(wrong), "right")
    for kind in () if config.gold_only else VARIANTS:
        right = len(report.accepted[kind])
        table.add_row(kind, str(right), str(judged - right), "wrong")
    Console().print(table)
    Console().print(f"{report.tasks} tasks, {len(report.no_verdict)} without a verdict")
    if config.out is not None:
        with atomic_path(config.out) as path:
            path.write_text(json.dumps(vars(report), indent=1) + "\n")
    return report


async def _check(config: CodeGoldConfig) -> CodeGoldReport:
    """Grade everything."""
    sandbox = SandboxProvider(config.sandbox, allow_unsafe=config.allow_unsafe_tools)
    domain = parse_tasks(config.tasks, sandbox)
    if domain.name != "code":
        raise InputError(f"{config.tasks!r} is of the domain {domain.name!r}: give code:FILE.jsonl")
    sandbox()  # refuses here, not in the middle
    tasks = domain.load(split=config.split, first=config.first_task, count=config.num_tasks)
    report = CodeGoldReport(tasks=len(tasks))
    slots = asyncio.Semaphore(config.concurrency)
    try:
        with progress("tasks", len(tasks)) as bar:

            async def one(task: Task) -> None:
                async with slots:
                    await _check_task(domain, task, report, {} if config.gold_only else VARIANTS)
                bar.advance()

            await asyncio.gather(*map(one, tasks))
    finally:
        await sandbox.close()
    return report


async def _check_task(
    domain: TaskDomain, task: Task, report: CodeGoldReport, variants: Mapping[str, str]
) -> None:
    """Grade the gold solution of a task and variants of it."""
    names = HiddenTests.of(task).functions
    try:
        if await domain.grade(task, task.answer) != 1.0:
            report.gold_wrong.append(task.task_id)
        for kind, code in variants.items():
            added = "\n".join(code.format(name=name) for name in names)
            if await domain.grade(task, f"{task.answer}\n\n{added}") != 0.0:
                report.accepted[kind].append(task.task_id)
    except ToolFailure as failure:
        report.no_verdict[task.task_id] = str(failure)
