r"""Records on disk: JSONL while they grow, Parquet once frozen.

This is the storage interface of the project; the parts behind it are `trajectory.codec`
(records and JSON), `trajectory.atomic` (whole-file replacement) and `trajectory.parquet`.

A JSONL line is the JSON of one record. Lines end with ``\n``; an unterminated last line is what a
killed writer leaves, and only readers that say ``tail="drop"`` pass over it. Numbers keep every
bit; NaN and infinity are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NoReturn, Self, TypeVar

from trajectory.atomic import atomic_folder, atomic_path
from trajectory.codec import from_json, to_json
from trajectory.errors import InputError
from trajectory.parquet import read_labels, write_labels

__all__ = [
    "JsonlWriter",
    "atomic_folder",
    "atomic_path",
    "from_json",
    "read_at",
    "read_jsonl",
    "read_labels",
    "read_offsets",
    "repair_tail",
    "to_json",
    "write_jsonl",
    "write_labels",
]

RecordT = TypeVar("RecordT")


def read_jsonl(
    path: str | Path, cls: type[RecordT], *, tail: Literal["error", "drop"] = "error"
) -> Iterator[RecordT]:
    """Read records from a JSONL file, one at a time.

    Parameters
    ----------
    path : str or Path
        The file; an empty file holds no records, empty lines are skipped.
    cls : type
        The record class of every line.
    tail : {"error", "drop"}
        What to do with an unterminated last line: read it as any other line (an error unless it
        is complete), or pass over it, as the ledger does with what a killed writer left.

    Yields
    ------
    record
        In file order.

    Raises
    ------
    InputError
        If the file is missing, or a line is not a record; the message has file and line number.
    """
    return _read_lines(_existing(path), cls, tail)


def _existing(path: str | Path) -> Path:
    """Refuse a path that is no file."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a JSONL file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {kind}: give the path of an existing .jsonl file")
    return path


def read_at(path: str | Path, cls: type[RecordT], offsets: Iterable[int]) -> Iterator[RecordT]:
    """Read the records whose lines begin at the given bytes of a JSONL file.

    Parameters
    ----------
    path : str or Path
        A file that `JsonlWriter.append` or `read_offsets` gave the offsets of.
    cls : type
        The record class.
    offsets : iterable of int
        First byte of each line, in any order.

    Raises
    ------
    InputError
        If a line is not a record: the file was changed meanwhile.
    """
    path = Path(path)
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield _parse(file.readline(), cls, f"{path}, byte {offset}")


def read_offsets(path: str | Path, cls: type[RecordT]) -> Iterator[tuple[int, RecordT]]:
    """Read records with the byte at which each line begins, for `read_at`.

    Raises
    ------
    InputError
        As `read_jsonl`.
    """
    path = _existing(path)
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield offset, _parse(line, cls, f"{path}, line {number}")
            offset += len(line)


def _read_lines(path: Path, cls: type[RecordT], tail: str) -> Iterator[RecordT]:
    """Yield the records of an existing file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            cut = not line.endswith(b"\n")
            if cut and tail == "drop":
                return
            if not line.strip():
                continue
            yield _parse(line, cls, f"{path}, line {number}")


def _parse(line: bytes, cls: type[RecordT], place: str) -> RecordT:
    """Make the record of one line."""
    try:
        obj = json.loads(line, parse_constant=_refuse_constant)
        return from_json(cls, obj)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " (the last line is cut off)"
        raise InputError(f"{place}: {_sentence(error)}{hint}") from error


def _sentence(error: Exception) -> str:
    """Say what is wrong with a line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def repair_tail(path: str | Path) -> int:
    """Cut off an unterminated last line, as a killed writer leaves it.

    Parameters
    ----------
    path : str or Path
        A JSONL file; a missing one needs no repair.

    Returns
    -------
    int
        Lines dropped, 0 or 1.
    """
    path = Path(path)
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = _last_line_start(file, end)
        if start == end:
            return 0
        file.truncate(start)
        file.flush()
        os.fsync(file.fileno())
    return 1


def _last_line_start(file: BinaryIO, end: int) -> int:
    """Return the offset after the last newline, reading backwards in blocks."""
    position = end
    while position > 0:
        size = min(65536, position)
        position -= size
        file.seek(position)
        found = file.read(size).rfind(b"\n")
        if found >= 0:
            return position + found + 1
    return 0


def encode_line(record: object) -> bytes:
    """Return the record's JSONL line, newline included.

    Raises
    ------
    ValueError
        If a number is NaN or infinite.
    """
    obj = to_json(record)
    text = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: only its escape can be written
        return json.dumps(obj, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def write_jsonl(path: str | Path, records: Iterable[object]) -> int:
    """Write records to a file that replaces ``path`` as a whole.

    Returns
    -------
    int
        Records written.
    """
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(encode_line(record))
            count += 1
    return count


class JsonlWriter:
    """Append records to a JSONL file; each is on its way to disk when `append` returns.

    Parameters
    ----------
    path : str or Path
        The file; created with its folder if missing.
    fsync : bool, default=False
        Wait for the disk after every record: survives a power cut, not only a killed process.

    Raises
    ------
    InputError
        If the file ends in a cut line (see `repair_tail`).

    Examples
    --------
    >>> import tempfile
    >>> from trajectory.records import ToolCall
    >>> path = Path(tempfile.mkdtemp()) / "calls.jsonl"
    >>> with JsonlWriter(path) as writer:
    ...     writer.append(ToolCall(name="calculator", arguments="{}"))
    0
    >>> [call.name for call in read_jsonl(path, ToolCall)]
    ['calculator']
    """

    def __init__(self, path: str | Path, *, fsync: bool = False) -> None:
        self.path = Path(path)
        self._fsync = fsync
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self.close()
            raise InputError(
                f"{self.path} ends in a cut line: repair it (trajectory.store.repair_tail) before "
                "appending"
            )

    def append(self, record: object) -> int:
        """Write one record as one line; a line that does not fit on the disk is taken back.

        Returns
        -------
        int
            The byte at which the line begins, for `read_at`.

        Raises
        ------
        OSError
            If the disk is full or broken; the file keeps the lines before.
        ValueError
            If a number is NaN or infinite, or the writer is closed.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the writer is closed")
        line = encode_line(record)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        if self._fsync:
            os.fsync(self._descriptor)
        return size

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
