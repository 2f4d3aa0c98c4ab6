"""The program that the `sandboxfusion` backend sends: it repeats cells, runs the last and reports.

It runs on the server, on Python 3.8 or later, imports nothing of this project but the two files
sent with it (``runner.py`` and ``output.py``), and reads ``request.json`` from its own folder. A
first start replaces itself by one with an empty environment and a fixed hash seed.

A child runs the cells; this process holds the files it prints into, waits, ends what is left and
writes the report to stdout, which the child does not have: facts about how the child ended come
from the kernel, and what the server has to carry is small however much is printed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import types
from contextlib import suppress
from typing import TypedDict

MARK = "@report "
"""Begins the line of the report."""
GRACE_SECONDS = 5.0
"""How long this process waits beyond the wall-clock limits of all cells."""


class Request(TypedDict):
    """What is to be run."""

    cells: list[tuple[int, str]]
    """Number and code of the cells to repeat, then of the one to run."""
    seed: int
    environment: dict[str, str]
    cpu_s: float
    wall_s: float
    memory_bytes: int
    file_bytes: int
    output_chars: int


class Note(TypedDict):
    """What a cell that ended by itself did."""

    status: str
    error: str | None
    digest: str
    """Of its stdout as shown, addresses left out."""
    cpu_s: float
    wall_s: float


class Report(TypedDict):
    """How the child ended; texts are those of the last cell."""

    ready: bool
    """False if the child ended before the first cell."""
    notes: list[Note]
    exit_code: int | None
    signal: str | None
    """Name of the signal that ended it."""
    overdue: bool
    """True if the child had to be ended because its own alarms did not."""
    cpu_s: float
    """Of all cells."""
    wall_s: float
    """Of all cells."""
    printed_bytes: int
    """Of stdout or stderr, whichever is more."""
    stdout: str
    stderr: str


# Bound here, so that code which overwrites modules does not break its own later cells.
_dumps, _write, _pread, _truncate = json.dumps, os.write, os.pread, os.ftruncate
_seek = os.lseek
_monotonic, _process_time, _sha256 = time.monotonic, time.process_time, hashlib.sha256
_setitimer, _real, _prof = signal.setitimer, signal.ITIMER_REAL, signal.ITIMER_PROF


def cut_text(output: types.ModuleType, fd: int, max_chars: int) -> str:
    """Return what was printed into a file, its middle cut out."""
    capture, offset = output.Capture(max_chars), 0
    while data := _pread(fd, 1 << 20, offset):
        capture.feed(data)
        offset += len(data)
    return str(capture.text())


def run_cells(
    request: Request,
    files: tuple[int, int, int],
    runner: types.ModuleType,
    output: types.ModuleType,
) -> None:
    """Run the cells in one namespace; write a line on each that ends by itself."""
    out, err, notes = files
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    sys.argv = [""]
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    runner.confine(os.getppid(), request["memory_bytes"], request["file_bytes"])
    runner.random.seed(request["seed"])
    sys.meta_path.insert(0, runner.SeedNumpy(request["seed"]))
    names = runner.new_notebook()
    _write(notes, b"{}\n")
    for number, code in request["cells"]:
        for fd in (out, err):
            _truncate(fd, 0)
            _seek(fd, 0, 0)
        started, cpu_before = _monotonic(), _process_time()
        _setitimer(_prof, request["cpu_s"])
        _setitimer(_real, request["wall_s"])
        status, error = runner.run_captured(code, number, names, (out, err), request["cpu_s"])
        _setitimer(_real, 0)
        _setitimer(_prof, 0)
        text = output.mask_addresses(cut_text(output, out, request["output_chars"]))
        note: Note = {
            "status": status,
            "error": error,
            "digest": _sha256(text.encode()).hexdigest()[:16],
            "cpu_s": _process_time() - cpu_before,
            "wall_s": _monotonic() - started,
        }
        _write(notes, _dumps(note).encode() + b"\n")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, 0 where the system does not show it."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux's clock of a process
    except OSError:
        return 0.0


def supervise(child: int, request: Request) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for the child; return its wait status, what it used, and whether it had to be ended.

    Its own alarms end a cell to the point; this ends code that ignores them.
    """
    cpu_s, wall_s = (request[limit] * len(request["cells"]) for limit in ("cpu_s", "wall_s"))
    deadline, overdue = time.monotonic() + wall_s + GRACE_SECONDS, False
    pause = 0.001
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline or cpu_seconds(child) > cpu_s + GRACE_SECONDS / 5:
            overdue = True
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what the child started and left behind
    return status, used, overdue


def read_notes(lines: list[bytes]) -> list[Note]:
    """Return the notes up to the first line that is none, as code may have written here too."""
    notes = []
    for line in lines:
        try:
            notes.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return notes


def signal_name(number: int) -> str:
    """Return the name of a signal on this system."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def supervised(request: Request) -> Report:
    """Run the request in a child and return how it ended."""
    # Imported before the child can change the files.
    runner, output = importlib.import_module("runner"), importlib.import_module("output")
    started = time.monotonic()
    temporary = tempfile.TemporaryFile
    with temporary() as out, temporary() as err, temporary() as notes:
        files = out.fileno(), err.fileno(), notes.fileno()
        child = os.fork()
        if child == 0:
            try:
                run_cells(request, files, runner, output)
                os._exit(0)
            except BaseException as error:  # before the first cell, or after code that broke this
                os.write(2, f"{error!r}\n".encode(errors="backslashreplace"))
            finally:
                os._exit(1)
        status, used, overdue = supervise(child, request)
        notes.seek(0)
        lines = notes.read(1 << 20).splitlines()
        return {
            "ready": bool(lines),
            "notes": read_notes(lines[1:]),
            "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None,
            "overdue": overdue,
            "cpu_s": used.ru_utime + used.ru_stime,
            "wall_s": time.monotonic() - started,
            "printed_bytes": max(os.fstat(fd).st_size for fd in files[:2]),
            "stdout": cut_text(output, files[0], request["output_chars"]),
            "stderr": cut_text(output, files[1], request["output_chars"]),
        }


def main() -> None:
    """Run the request and print the report."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "request.json"), encoding="utf-8") as file:
        request: Request = json.load(file)
    if len(sys.argv) == 1:
        scratch = os.path.join(here, "scratch")
        os.mkdir(scratch)
        os.chdir(scratch)
        environment = {**request["environment"], "HOME": scratch, "TMPDIR": scratch}
        command = [sys.executable, "-s", os.path.abspath(__file__), "run"]
        os.execve(sys.executable, command, environment)  # noqa: S606  (itself again)
    report = json.dumps(supervised(request), ensure_ascii=False)
    sys.stdout.buffer.write(f"\n{MARK}{report}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    main()
