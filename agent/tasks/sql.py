"""Questions about a database, answered with a query: Spider, InterCode-SQL and files like them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from agent.sandbox import SandboxProvider
from agent.sandbox.base import Limits
from agent.tasks.base import Split
from agent.tasks.rows import PROBLEM_COLUMNS, Row, make_tasks, read_rows, select
from agent.tasks.sql_results import same_rows
from agent.tasks.sql_text import orders_rows, query_in, schema_outline
from agent.tools.base import ToolFailure
from agent.tools.sql import MAX_QUERY_CHARS
from agent.tools.sql_box import Caps, Reply, SqlBox, StatementResult
from agent.tools.sql_database import database_path, packed_database, read_database
from trajectory.errors import InputError
from trajectory.records import JsonValue, Step, Task

SYSTEM_PROMPT = """\
Answer questions about an SQLite database with a query. First call the tool sql to look at the data
and to try queries; then reply with the one query that answers the question, alone in a block of
sql. It returns exactly the columns that are asked for.

Example
Question: What is the name of the heaviest dog?
Your first turn:
<tool_call>
{"name": "sql", "arguments": {"query": "SELECT name, weight FROM dog ORDER BY weight DESC LIMIT 2"}}
</tool_call>
You are shown:
name | weight
-----+-------
Rex  | 30.5
Ada  | 8.0
(2 rows)
Your last turn:
```sql
SELECT name FROM dog ORDER BY weight DESC LIMIT 1
```"""
"""Small models write neither calls nor blocks that they were not shown."""

DATABASE_COLUMNS = ("db_id", "db", "database")
GOLD_COLUMNS = ("gold", "query", "sql", "answer")
GOLD_CAPS = Caps(rows=20_000, columns=2_000, chars=1_500_000, cell_chars=200)
"""Largest gold result that can be compared with."""
ANSWER_CHARS = 2 * GOLD_CAPS.chars
"""More than a gold result has, as 1.0 takes more characters than 1."""
MAX_GOLD_RESULTS = 256
"""Gold results kept: the rollouts of one task are graded near each other."""


class SqlDomain:
    """Questions from a file, judged by what the answered query returns.

    Parameters
    ----------
    path : str
        A JSONL file. Columns: ``question``, ``query`` (gold SQL) and ``db_id``, as in Spider; or
        ``query`` (question), ``gold`` and ``db``, as in InterCode. ``id`` (``task_id``) is
        optional. The file is one split, returned whole for each, unless it has a column
        ``split``.
    databases : str, optional
        Folder with the files ``DB_ID.sqlite`` (or ``DB_ID/DB_ID.sqlite``); default: ``database``
        beside the file.
    thinned : int, default=0
        Copies of the database, each without about half of its rows, on which an answer has to
        return what the gold query does as well.
    sandbox : SandboxProvider
        Where gold and answered queries run.
    limits : Limits, optional
        Bounds of every one of them.

    Notes
    -----
    An answer is right if it is one statement that returns the rows of the gold query. Both run
    on fresh copies of the database, without what the agent wrote, in sandbox sessions that its
    calls never touched, read-only and with the guards of the tool; the rows are compared outside:

    - The order of rows counts only if the gold query has an ORDER BY of its own.
    - Duplicate rows count.
    - The order of columns counts, their names do not.
    - Two integers are equal if they are the same, other numbers within 1e-6 (or 1e-9 of the
      larger): 1 equals 1.0. NULL equals NULL alone. Texts are compared exactly.

    What equals the gold result on this database alone, like a constant copied from what the tool
    showed, is right by these rules; ``thinned`` copies find most of that. They may also reject a
    right query where the gold query leaves a choice, as among equals under a LIMIT.
    """

    def __init__(
        self,
        path: str,
        sandbox: SandboxProvider,
        *,
        databases: str = "",
        thinned: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self.name = "sql"
        self.system_prompt = SYSTEM_PROMPT
        self.default_tools: tuple[str, ...] = ("sql",)
        self._path = Path(path)
        self._folder = Path(databases) if databases else self._path.parent / "database"
        self._sandbox = sandbox
        self._limits = limits or Limits()
        self._thinned = thinned
        self._gold: dict[tuple[str, str, int], StatementResult] = {}

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Return tasks ``first .. first + count`` of a split (all when count is None).

        Raises
        ------
        InputError
            If the file is missing, malformed (with the line number) or has too few tasks, or a
            database is missing or unreadable.
        """
        rows = self._with_schema(read_rows(self._path))
        tasks = make_tasks(rows, domain=self.name, gold=lambda row: str(row["answer"]))
        return select(tasks, source=str(self._path), split=split, first=first, count=count)

    def extract(self, text: str) -> str | None:
        """Return the last block fenced as ``sql``, else what follows "Answer:", else a query."""
        return query_in(text)

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if the answered query returns what the gold query does, else 0.0.

        Raises
        ------
        ToolFailure
            If the sandbox broke, or the gold query gives no result to compare with.
        """
        if len(answer) > MAX_QUERY_CHARS:
            return 0.0
        for copy in range(self._thinned + 1):
            if not await self._agrees(task, answer, copy):
                return 0.0
        return 1.0

    async def _agrees(self, task: Task, answer: str, copy: int) -> bool:
        """Compare with the gold query on one copy; 0 is the whole database."""
        gold = await self._gold_result(task, copy)
        caps = Caps(
            rows=gold.num_rows,
            columns=gold.num_columns,
            chars=ANSWER_CHARS,
            cell_chars=GOLD_CAPS.cell_chars,
        )
        given = _only_result(await self._run(_packed(task), answer, copy, caps))
        if given is None or given.num_columns != gold.num_columns:
            return False
        if given.num_rows != gold.num_rows or not _is_complete(given):
            return False
        return same_rows(gold.rows, given.rows, ordered=orders_rows(task.answer))

    async def _gold_result(self, task: Task, copy: int) -> StatementResult:
        """Return what the gold query gives."""
        key = _packed(task), task.answer, copy
        if key not in self._gold:
            reply = await self._run(*key, GOLD_CAPS)
            result = _only_result(reply)
            if result is None or not _is_complete(result):
                raise ToolFailure(
                    f"the gold query of task {task.task_id!r} gives no result to compare with: "
                    f"{_why(reply)}"
                )
            while len(self._gold) >= MAX_GOLD_RESULTS:
                del self._gold[next(iter(self._gold))]
            self._gold[key] = result
        return self._gold[key]

    async def _run(self, packed: str, query: str, copy: int, caps: Caps) -> Reply:
        """Run a query on a fresh copy of a packed database."""
        box = await SqlBox.open(
            self._sandbox(), self._limits, packed, seed=0, read_only=True, thinned=copy
        )
        try:
            return await box.query(query, caps)
        finally:
            await box.close()

    def _with_schema(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Yield rows with the columns ``problem``, ``answer`` and ``database``."""
        for place, row in rows:
            gold = _text(row, GOLD_COLUMNS, "gold query", place)
            asked = PROBLEM_COLUMNS if "gold" not in row else (*PROBLEM_COLUMNS, "query")
            question = _text(row, asked, "question", place)
            name = _text(row, DATABASE_COLUMNS, "database name", place)
            path = self._find(name, place)
            rest: dict[str, JsonValue] = {
                key: value
                for key, value in row.items()
                if isinstance(value, str | int | float)
                and key not in (*asked, *GOLD_COLUMNS, *DATABASE_COLUMNS, "id", "task_id")
            }
            yield (
                place,
                {
                    **rest,
                    "id": row.get("id", row.get("task_id")),
                    "problem": f"{_outline(path)}\n\nQuestion: {question}",
                    "answer": gold,
                    "database": str(path),
                },
            )

    def _find(self, name: str, place: str) -> Path:
        """Return the file of a database."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{place}: {name!r} is no database name: letters, digits, _ . - only")
        candidates = (
            self._folder / f"{name}.sqlite",
            self._folder / name / f"{name}.sqlite",
        )
        for path in candidates:
            if path.is_file():
                return path
        raise InputError(
            f"{place}: no database {candidates[0]}: name the folder of the databases, as in "
            f"sql:{self._path},databases=FOLDER"
        )


def _text(row: Row, columns: Sequence[str], what: str, place: str) -> str:
    """Return the first of some columns that a row has."""
    column = next((name for name in columns if name in row), None)
    value = row[column] if column else None
    if not isinstance(value, str) or not value.strip():
        names = ", ".join(columns)
        raise InputError(f"{place}: no {what}: one of the columns {names} must hold a text")
    return value.strip()


@lru_cache(maxsize=256)
def _outline(path: Path) -> str:
    """Return the schema of a database file."""
    try:
        return schema_outline(read_database(path))
    except sqlite3.Error as error:
        raise InputError(f"cannot read the schema of the database {path}: {error}") from error


def _packed(task: Task) -> str:
    """Return a task's database; without one there is no verdict."""
    try:
        return packed_database(database_path(task))
    except InputError as error:
        raise ToolFailure(str(error)) from error


def _only_result(reply: Reply) -> StatementResult | None:
    """Return the result of the one statement that returns rows, None if it is not one."""
    if reply.status != "ok":
        return None
    found = [result for result in reply.results if result.columns is not None]
    return found[0] if len(found) == 1 else None


def _is_complete(result: StatementResult) -> bool:
    """Tell whether a result came out of the sandbox whole."""
    return len(result.rows) == result.num_rows


def _why(reply: Reply) -> str:
    """Say why a reply cannot be compared with."""
    if reply.status != "ok":
        return reply.message or reply.status
    results = [result for result in reply.results if result.columns is not None]
    if len(results) != 1:
        return f"{len(results)} statements return rows, one must"
    return f"{results[0].num_rows} rows are too many or too long"
