"""Progress of long work: a bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LINE_EVERY_S = 30.0

Field = str | int | float


class Progress(Protocol):
    """What the caller of `progress` advances."""

    def advance(self, n: int = 1, **fields: Field) -> None:
        """Count ``n`` more items done; ``fields`` are shown as ``name value`` until replaced."""
        ...

    def grow(self, n: int) -> None:
        """Raise the total by ``n`` items that have become known; lower it if ``n`` < 0."""
        ...


@contextmanager
def progress(description: str, total: int | None, *, done: int = 0) -> Iterator[Progress]:
    """Show how far a piece of work is, on standard error.

    Parameters
    ----------
    description : str
        What is being counted.
    total : int or None
        Items in all; None if unknown.
    done : int, default=0
        Items finished by an earlier, interrupted run; they do not count for the rate.

    Yields
    ------
    Progress
        Call ``advance`` after each item. On a terminal a bar shows count, rate and time left;
        elsewhere a line is printed at most every 30 s, and one at the end.
    """
    if sys.stderr.isatty():
        with _bar(description, total, done) as bar:
            yield bar
        return
    lines = _Lines(description, total, done, sys.stderr)
    try:
        yield lines
    finally:
        lines.show()


class _Lines:
    """Progress as plain lines."""

    def __init__(self, description: str, total: int | None, done: int, stream: TextIO) -> None:
        self._description, self._total, self._stream = description, total, stream
        self._first = self._done = done
        self._started = self._shown = time.monotonic()
        self._fields: dict[str, Field] = {}

    def advance(self, n: int = 1, **fields: Field) -> None:
        self._done += n
        self._fields.update(fields)
        if time.monotonic() - self._shown >= _LINE_EVERY_S:
            self.show()

    def grow(self, n: int) -> None:
        self._total = (self._total or 0) + n

    def show(self) -> None:
        """Print the present state."""
        self._shown = time.monotonic()
        seconds = self._shown - self._started
        count = str(self._done) if self._total is None else f"{self._done}/{self._total}"
        rate = (self._done - self._first) / seconds if seconds > 0 else 0.0
        parts = [f"{self._description}: {count}", f"{seconds:.0f} s", f"{rate:.3g}/s"]
        if self._total is not None and rate > 0 and self._done < self._total:
            parts.append(f"{(self._total - self._done) / rate:.0f} s left")
        if self._fields:
            parts.append(_show_fields(self._fields))
        print(", ".join(parts), file=self._stream, flush=True)


def _show_fields(fields: dict[str, Field]) -> str:
    """Render the extra fields."""
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    )


@contextmanager
def _bar(description: str, total: int | None, done: int) -> Iterator[Progress]:
    """Run a rich progress bar."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}", markup=False),
    )
    # rich would send what the command prints to standard output to standard error, pipe or not.
    stdout_here = sys.stdout.isatty()
    display = RichProgress(*columns, console=Console(stderr=True), redirect_stdout=stdout_here)
    with display:
        task = display.add_task(description, total=total, completed=done, rate="", extra="")
        yield _Bar(display, task, total)


class _Bar:
    """Progress as a rich bar."""

    def __init__(self, display: RichProgress, task: TaskID, total: int | None) -> None:
        self._display, self._task, self._total = display, task, total
        self._started, self._new = time.monotonic(), 0
        self._fields: dict[str, Field] = {}

    def advance(self, n: int = 1, **fields: Field) -> None:
        self._new += n
        self._fields.update(fields)
        seconds = time.monotonic() - self._started
        rate = f"{self._new / seconds:.3g}/s" if seconds > 0 else ""
        self._display.update(self._task, advance=n, rate=rate, extra=_show_fields(self._fields))

    def grow(self, n: int) -> None:
        self._total = (self._total or 0) + n
        self._display.update(self._task, total=self._total)
