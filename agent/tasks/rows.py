"""Reading problems and answers from JSONL files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from agent.tasks.base import Split
from trajectory.errors import InputError
from trajectory.records import JsonValue, Task

PROBLEM_COLUMNS = ("problem", "question", "prompt")
"""Where the problem's text may stand; the first present counts."""

Row = Mapping[str, JsonValue]
GoldReader = Callable[[Row], str | None]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)`` for every non-empty line; ``place`` names file and line.

    Raises
    ------
    InputError
        If the file cannot be read or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: give the path of a JSONL file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: give the path of a JSONL file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error


def make_tasks(rows: Iterable[tuple[str, Row]], *, domain: str, gold: GoldReader) -> list[Task]:
    """Turn rows into tasks.

    Parameters
    ----------
    rows : iterable of (str, mapping)
        Where each row stands, for messages, and its columns.
    domain : str
        Name of the domain that will judge them.
    gold : callable
        Returns a row's gold answer, None if it has none.

    Raises
    ------
    InputError
        If a row lacks a problem or an answer, or two rows have the same id.

    Notes
    -----
    Columns that are not used otherwise become the task's ``meta``. A row without ``id`` gets a
    hash of problem and answer.
    """
    tasks: list[Task] = []
    places: dict[str, str] = {}
    for place, row in rows:
        column = next((name for name in PROBLEM_COLUMNS if name in row), None)
        problem = row.get(column) if column else None
        if not isinstance(problem, str) or not problem.strip():
            names = ", ".join(PROBLEM_COLUMNS)
            raise InputError(f"{place}: no problem: one of the columns {names} must hold a text")
        answer = gold(row)
        if answer is None or not answer.strip():
            raise InputError(f"{place}: no answer: the column 'answer' must hold a text or number")
        task_id = _task_id(row, problem, answer, place)
        if task_id in places:
            raise InputError(f"{place}: the id {task_id!r} was used before in {places[task_id]}")
        places[task_id] = place
        meta = {key: value for key, value in row.items() if key not in ("id", "answer", column)}
        tasks.append(
            Task(task_id=task_id, domain=domain, prompt=problem, answer=answer.strip(), meta=meta)
        )
    return tasks


def answer_column(row: Row) -> str | None:
    """Return the ``answer`` column as text."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    return str(answer)


def select(
    tasks: Sequence[Task], *, source: str, split: Split, first: int, count: int | None
) -> Sequence[Task]:
    """Return a range of the tasks of a split.

    A source without a column ``split`` is one split, and every split returns it whole; with one,
    the rows whose value equals ``split`` are that split.

    Raises
    ------
    InputError
        If the split is empty, only some rows name their split, or the range is too long.
    """
    named = [task.meta["split"] for task in tasks if "split" in task.meta]
    if named and len(named) != len(tasks):
        raise InputError(f"{source}: {len(named)} of {len(tasks)} rows have a column 'split'")
    if named:
        tasks = [task for task in tasks if task.meta["split"] == split]
        if not tasks:
            known = ", ".join(sorted({str(name) for name in named}))
            raise InputError(f"{source} has no row of split {split!r}; it has {known}")
    if not tasks:
        raise InputError(f"{source} holds no task")
    end = len(tasks) if count is None else first + count
    if first < 0 or first >= len(tasks) or end > len(tasks):
        asked = f"tasks {first} to {end - 1}" if end > first else f"task {first} and later"
        raise InputError(f"{source} has {len(tasks)} tasks (0 to {len(tasks) - 1}): no {asked}")
    return tasks[first:end]


def _parse(line: str, place: str) -> Row:
    """Parse one line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
    return row


def _task_id(row: Row, problem: str, answer: str, place: str) -> str:
    """Return the row's id, or a hash of its content."""
    value = row.get("id")
    if value is None:
        return hashlib.sha256(f"{problem}\0{answer}".encode()).hexdigest()[:16]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value):
        raise InputError(f"{place}: the column 'id' must hold a text or a whole number")
    return str(value)
