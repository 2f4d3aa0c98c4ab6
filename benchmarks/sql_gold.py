"""``python -m benchmarks sql-gold``: how well the checker of `sql` tasks tells right from wrong.

Every gold query is graded, which must give 1, and every changed gold query whose result really
differs, which must give 0. Changed queries with the same result, and the gold result copied as
constants, give 1 on one database; they count what ``thinned`` copies find. What differs is
decided by running both in this process and comparing in another way than the checker.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.sandbox import AUTO, SandboxProvider
from agent.tasks import parse_tasks
from agent.tasks.base import TaskDomain
from agent.tools.base import ToolFailure
from agent.tools.sql_database import database_path, read_database
from benchmarks.sql_perturbations import copied, perturbations, really_differ, run
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import Task


@dataclass(frozen=True, kw_only=True)
class SqlGoldConfig:
    """Grade every gold query, and wrong variants of it."""

    tasks: str
    """Task source: sql:FILE.jsonl or sql:FILE.jsonl,databases=FOLDER,thinned=NUMBER."""
    first_task: int = 0
    """Index of the first task used."""
    num_tasks: int | None = None
    """How many tasks; all when not given."""
    sandbox: str = AUTO
    """Where the queries run: auto (the strongest this machine offers) or a backend."""
    allow_unsafe_tools: bool = False
    """Accept a sandbox that runs code without isolation on this machine."""
    concurrency: int = 4
    """Queries graded at a time."""
    out: Path | None = None
    """Write the counts and the ids of the rows that failed to this JSON file too."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InputError("--concurrency must be >= 1")


@dataclass(kw_only=True)
class SqlGoldReport:
    """What the checker said."""

    tasks: int = 0
    gold_fails: dict[str, str] = field(default_factory=dict)
    """Why the gold query gives nothing to compare with, by task id."""
    gold_wrong: list[str] = field(default_factory=list)
    """Tasks whose own gold query was judged wrong."""
    gold_empty: list[str] = field(default_factory=list)
    """Tasks whose gold query returns no row: any query without rows is right."""
    indistinct: list[str] = field(default_factory=list)
    """Tasks none of whose changed queries differs but in the number of columns."""
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By kind of change: ``tried``, ``failed`` (no result), ``differ``, ``rejected``, ``same``,
    ``accepted``."""
    misjudged: list[dict[str, str]] = field(default_factory=list)
    """Changed queries whose result differs and which were judged right."""


def check(config: SqlGoldConfig) -> SqlGoldReport:
    """Run the check and print its tables.

    Raises
    ------
    InputError
        If the tasks are not of the domain ``sql`` or cannot be read.
    """
    report = asyncio.run(_check(config))
    console = Console()
    console.print(_tasks_table(report))
    console.print(_changes_table(report))
    if config.out is not None:
        with atomic_path(config.out) as path:
            path.write_text(json.dumps(vars(report), indent=1) + "\n")
    return report


async def _check(config: SqlGoldConfig) -> SqlGoldReport:
    """Grade everything."""
    sandbox = SandboxProvider(config.sandbox, allow_unsafe=config.allow_unsafe_tools)
    domain = parse_tasks(config.tasks, sandbox)
    if domain.name != "sql":
        raise InputError(f"{config.tasks!r} is of the domain {domain.name!r}: give sql:FILE.jsonl")
    sandbox()  # refuses here, not in the middle
    tasks = domain.load(split="test", first=config.first_task, count=config.num_tasks)
    report = SqlGoldReport(tasks=len(tasks))
    slots = asyncio.Semaphore(config.concurrency)
    try:
        with progress("tasks", len(tasks)) as bar:

            async def one(task: Task) -> None:
                async with slots:
                    await _check_task(domain, task, report)
                bar.advance()

            await asyncio.gather(*map(one, tasks))
    finally:
        await sandbox.close()
    for names in (report.gold_wrong, report.gold_empty, report.indistinct):
        names.sort()
    return report


async def _check_task(domain: TaskDomain, task: Task, report: SqlGoldReport) -> None:
    """Grade the gold query of a task and what was made of it."""
    try:
        verdict = await domain.grade(task, task.answer)
    except ToolFailure as failure:
        report.gold_fails[task.task_id] = str(failure).rpartition("compare with: ")[2]
        return
    if verdict != 1.0:
        report.gold_wrong.append(task.task_id)
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(read_database(database_path(task)))
        connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
        gold = run(connection, task.answer)
        if gold is None:
            report.gold_fails[task.task_id] = "fails outside the sandbox only"
            return
        if not gold[1]:
            report.gold_empty.append(task.task_id)
        distinct = False
        for change in filter(None, (*perturbations(task.answer), copied(gold[1]))):
            counts = report.counts[change.kind]
            counts["tried"] += 1
            changed = run(connection, change.query)
            if changed is None:
                counts["failed"] += 1
                continue
            differs = really_differ(task.answer, gold, changed)
            distinct = distinct or (differs and change.kind != "columns")
            right = await domain.grade(task, change.query) == 1.0
            counts["differ" if differs else "same"] += 1
            counts["rejected"] += differs and not right
            counts["accepted"] += right and not differs
            if differs and right:
                report.misjudged.append({"task": task.task_id, "query": change.query})
    if not distinct:
        report.indistinct.append(task.task_id)


def _tasks_table(report: SqlGoldReport) -> Table:
    """Count the tasks."""
    table = Table("tasks", "n", title="gold queries")
    rows: Sequence[tuple[str, int]] = (
        ("all", report.tasks),
        ("gold fails", len(report.gold_fails)),
        ("gold judged wrong", len(report.gold_wrong)),
        ("gold returns no row", len(report.gold_empty)),
        ("no changed query differs in its rows", len(report.indistinct)),
        ("differing queries judged right", len(report.misjudged)),
    )
    for name, number in rows:
        table.add_row(name, str(number))
    for reason, number in Counter(report.gold_fails.values()).most_common():
        table.add_row(f"gold fails: {reason}", str(number))
    return table


def _changes_table(report: SqlGoldReport) -> Table:
    """Count the changed queries by kind."""
    names = ("tried", "failed", "differ", "rejected", "same", "accepted")
    table = Table("change", *names, title="changed gold queries")
    total: Counter[str] = Counter()
    for kind, counts in sorted(report.counts.items()):
        table.add_row(kind, *(str(counts[name]) for name in names))
        total += counts
    table.add_row("all", *(str(total[name]) for name in names))
    return table
