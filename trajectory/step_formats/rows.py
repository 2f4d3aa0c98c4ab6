"""Rows of a data file, each with the place it stands at and checked against a pydantic model."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from trajectory.atomic import atomic_path
from trajectory.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""File types that are read: one object a line, a list of objects, or a table."""

RowT = TypeVar("RowT", bound=BaseModel)


def data_files(path: Path) -> list[Path]:
    """List the data files behind a path: itself, or those directly in the folder, by name.

    Raises
    ------
    InputError
        If there is no such file, or none of a type that is read.
    """
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    else:
        found = [path] if path.is_file() and path.name.endswith(SUFFIXES) else []
    if not found:
        what = "holds no data file" if path.is_dir() else "is no data file"
        raise InputError(f"{path} {what}: give an existing {', '.join(SUFFIXES)} file")
    return found


def stem(path: Path) -> str:
    """Return a data file's name without its suffixes.

    Examples
    --------
    >>> stem(Path("intercode/sql_runs.jsonl.gz"))
    'sql_runs'
    """
    return path.name.split(".", 1)[0]


def read_rows(path: Path, model: type[RowT]) -> Iterator[tuple[str, RowT]]:
    """Read the rows of one data file.

    Parameters
    ----------
    path : Path
        A file that `data_files` gave.
    model : type
        What a row must hold; further fields are the model's own business.

    Yields
    ------
    tuple of (str, row)
        The place, for messages (``FILE, line 3``), and the row.

    Raises
    ------
    InputError
        If the file cannot be read, or a row is malformed; names file, line and field.
    """
    for place, obj in _objects(path):
        try:
            row = model.model_validate(obj)
        except ValidationError as error:
            raise InputError(f"{place}: {_first_problem(error)}") from error
        yield place, row


def _objects(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the parsed rows of a file with their places."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for obj in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", obj
        return
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise InputError(f"{path} holds no list of rows: give one, or a .jsonl file")
        for number, obj in enumerate(rows, start=1):
            yield f"{path}, row {number}", obj
        return
    yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the parsed lines of a JSONL file, compressed or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}, after line {number}: not a whole gzip file") from error


def _first_problem(error: ValidationError) -> str:
    """Say what is wrong with a row's first bad field."""
    problem = error.errors(include_url=False)[0]
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field.lstrip('.')}: {message}" if field else message


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write JSON objects to a .jsonl file that replaces ``path`` as a whole; returns how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def problem_id(problem: str) -> str:
    """Name a problem by its text, alike in every data set that holds it.

    Case, spaces and punctuation play no part, so that a copy with other dollar signs or quotes is
    the same problem. A reward model's list of seen tasks thereby holds across formats.

    Examples
    --------
    >>> problem_id("What is $2 + 2$?") == problem_id("what is 2+2")
    True
    >>> problem_id("What is 2 + 2?") == problem_id("What is 2 + 3?")
    False
    """
    plain = "".join(c for c in problem.casefold() if c.isalnum() or c in "+-*/^=<>")
    return "problem-" + hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()
