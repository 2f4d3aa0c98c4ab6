"""One worker of the `monty` backend: loading a state, running a cell within limits, dumping."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from agent.processes import cpu_seconds
from agent.sandbox.base import Limits, Status
from agent.sandbox.child import CHECK_SECONDS, MAX_OUTPUT_BYTES, Outcome
from agent.sandbox.echo import final_expression
from agent.sandbox.output import Capture

if TYPE_CHECKING:
    from pydantic_monty import Frame, MontyRuntimeError, MontySession, MontySyntaxError

T = TypeVar("T")
Reason = Literal["timeout", "output_limit", "closed"]
"""Why a worker was killed."""

MAX_TRACEBACK_FRAMES = 8
MAX_MESSAGE_CHARS = 8_192
_TRANSFER = Limits(cpu_s=60.0, wall_s=60.0)
"""Of a dump or load, which takes about 7 ms per MB; a loaded machine may take long."""

# The worker shows the last value itself, because a value handed over would be built anew here, out
# of reach of the limits, and lose its class. `print` is kept under a name that code does not
# overwrite by accident, and the trailing None keeps every other value where it is.
_SETUP = "__print__ = print\nNone\n"
_ECHO = "__echo__ = ("
_SHOW = "\n)\nif __echo__ is not None: __print__(f'{__echo__!r}')\n__echo__ = None\nNone\n"
_SILENT = "\nNone\n"
_INPUT_NAME = re.compile(r"<python-input-(\d+)>")


@dataclass(slots=True, weakref_slot=True, eq=False)
class State:
    """What a worker is brought back to a state with."""

    dump: bytes | None
    """The interpreter's own format; None once it was dropped to save memory."""
    numbers: tuple[int, ...]
    """Cell of each text the interpreter was given, in order; its tracebacks count by these."""


class MontyWorker:
    """A worker for one cell and the replays before it, and the watch over it.

    Its work blocks and is done in a thread; `watch` is for the event loop meanwhile. Limits are
    held by killing the worker, whose call in the thread then fails. (The package's own event-loop
    interface is not used: its threads abort the process when the interpreter ends.)

    Parameters
    ----------
    limits : Limits
        Bounds of every run.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._session: MontySession | None = None
        self._process: _Process | None = None
        self._numbers: tuple[int, ...] = ()
        self._lock = threading.Lock()  # between the thread and the watch
        self._clock: _Clock | None = None
        self._killed = threading.Event()
        self._reason: Reason | None = None

    @contextmanager
    def using(self, session: MontySession) -> Iterator[None]:
        """Work with a session checked out for this, until the block is left."""
        with _Process(session.worker_pid) as process:
            self._session = session
            with self._lock:
                self._process = process
            try:
                if self._killed.is_set():
                    process.kill()
                yield
            finally:
                with self._lock:
                    self._process = None

    def kill(self, reason: Reason) -> None:
        """End the worker, and with it the call that waits for it."""
        with self._lock:
            if self._killed.is_set():
                return
            self._reason = reason
            self._killed.set()
            if self._process is not None:
                self._process.kill()

    async def watch(self, work: asyncio.Future[T]) -> T:
        """Wait for the work, killing the worker at the first limit or when this is cancelled."""
        low, high = CHECK_SECONDS
        try:
            while not work.done():
                left = self._enforce_clock()
                await asyncio.wait((work,), timeout=min(max(left, low), high))
        except asyncio.CancelledError:
            self.kill("closed")
            await asyncio.wait((work,))
            with suppress(asyncio.CancelledError):
                work.exception()  # nobody is left to tell
            raise
        return work.result()

    def load(self, state: State | None) -> None:
        """Bring the worker to a state whose dump is kept, or to the empty one."""
        with self._watched(_Clock(self._process, _TRANSFER)):
            if state is None:
                self._used.feed_run(_SETUP)
                self._numbers = (0,)
            else:
                assert state.dump is not None
                self._used.load_session(state.dump)
                self._numbers = state.numbers

    def run(self, code: str, number: int) -> Outcome:
        """Run a cell; after any status but ``ok`` and ``error`` the state is lost."""
        out, err = Capture(self._limits.output_chars), Capture(self._limits.output_chars)
        clock = _Clock(self._process, self._limits)
        status, error = self._run(code, number, out, err, clock)
        return Outcome(
            status=status,
            error=error,
            stdout=out.text(),
            stderr=err.text(),
            cpu_s=clock.cpu_s,
            wall_s=clock.wall_s,
        )

    def run_and_dump(self, code: str, number: int) -> tuple[Outcome, State | None]:
        """Run a cell; return the state after it too, or None where there is none."""
        from pydantic_monty import MontyError

        outcome = self.run(code, number)
        if outcome.status not in ("ok", "error"):
            return outcome, None
        try:
            with self._watched(_Clock(self._process, _TRANSFER)):
                return outcome, State(self._used.dump(), self._numbers)
        except (MontyError, RuntimeError):  # its frame or the worker's memory is too small
            if self._reason == "timeout":  # it had ended at the last moment
                return replace(outcome, status="timeout", error="timeout"), None
            note = f"{outcome.stderr}the state is too large to be kept\n"
            return replace(outcome, status="crash", error="crash", stderr=note), None

    @property
    def _used(self) -> MontySession:
        """The session in use."""
        assert self._session is not None
        return self._session

    def _run(
        self, code: str, number: int, out: Capture, err: Capture, clock: _Clock
    ) -> tuple[Status, str | None]:
        """Run the cell with its last value shown if it has one; return how it ended."""
        from pydantic_monty import MontyCrashedError, MontyRuntimeError, MontySyntaxError

        def on_print(stream: str, text: str) -> None:
            capture = out if stream == "stdout" else err
            capture.feed(text.encode(errors="backslashreplace"))
            if capture.num_bytes > MAX_OUTPUT_BYTES:
                self.kill("output_limit")

        for source, last_line in _sources(code):
            self._numbers += (number,)
            try:
                with self._watched(clock):
                    self._used.feed_run(source, print_callback=on_print, os=self._system)
            except MontyCrashedError as problem:
                if self._reason in ("timeout", "output_limit"):
                    return self._reason, self._reason
                code_text = problem.exit_status
                reason = "by a signal" if code_text is None else f"exit code {code_text}"
                err.feed(f"the interpreter died ({reason})\n".encode())
                return "crash", "crash"
            except (MontyRuntimeError, MontySyntaxError) as problem:
                if last_line is not None and _did_not_parse(problem.traceback()):
                    continue  # the last statement is no expression: run the cell as it is
                status, error = self._ending(problem, clock)
                if status != "timeout":
                    _print_traceback(problem, self._numbers, last_line, err)
                return status, error
            break
        return "ok", None

    def _ending(
        self, problem: MontyRuntimeError | MontySyntaxError, clock: _Clock
    ) -> tuple[Status, str]:
        """Tell an exception of the code from a limit that the worker itself noticed."""
        if self._used.worker_pid is None:  # out of memory where it could not go on
            return "crash", "crash"
        name = problem.display("type-msg").partition(":")[0].strip()
        if name == "TimeoutError" and clock.wall_s >= clock.worker_limit_s:
            return "timeout", "timeout"
        return "error", name.rpartition(".")[2][:80]

    def _system(self, *, name: str, args: tuple[object, ...], **_: object) -> object:
        """Answer the calls that leave the interpreter: sleep until killed, and nothing else."""
        from pydantic_monty import NOT_HANDLED

        if name in ("time.sleep", "asyncio.sleep") and isinstance(args[0], int | float):
            if self._killed.wait(min(float(args[0]), threading.TIMEOUT_MAX)):
                raise TimeoutError("killed while sleeping")
            return args[1] if name == "asyncio.sleep" and len(args) > 1 else None
        return NOT_HANDLED

    @contextmanager
    def _watched(self, clock: _Clock) -> Iterator[None]:
        """Let the watch kill the worker by this clock while the block runs."""
        with self._lock:
            self._clock = clock
        try:
            yield
        finally:
            with self._lock:
                self._clock = None
            clock.read()

    def _enforce_clock(self) -> float:
        """Kill the worker if its time is up; return how long it has at most."""
        with self._lock:
            clock = self._clock
            left = CHECK_SECONDS[0] if clock is None else clock.seconds_left()
        if left <= 0:
            self.kill("timeout")
        return left


class _Process:
    """A worker process, signalled through a handle so that a reused id is never hit.

    Parameters
    ----------
    pid : int or None
        Its id.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._handle: int | None = None
        if pid is not None and sys.platform == "linux":
            try:
                self._handle = os.pidfd_open(pid)
            except ProcessLookupError:
                self._pid = None
            except OSError:  # a kernel without it, or no descriptor left
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def kill(self) -> None:
        """End it, if it lives."""
        with suppress(OSError):
            if sys.platform == "linux" and self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            elif self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)

    def cpu_seconds(self) -> float | None:
        """Return its CPU time, where the system shows it."""
        return None if self._pid is None else cpu_seconds(self._pid)


class _Clock:
    """The clocks of one run: wall, and CPU of the worker where the system shows it.

    Parameters
    ----------
    process : _Process or None
        The worker.
    limits : Limits
        Bounds of the run.
    """

    def __init__(self, process: _Process | None, limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._started, self._cpu_before = time.monotonic(), self._cpu()
        self.worker_limit_s = limits.cpu_s if self._cpu_before is None else limits.wall_s
        self.cpu_s = 0.0
        """CPU time used, seconds; 0 where it cannot be read."""
        self.wall_s = 0.0
        """Wall-clock time used, seconds."""

    def seconds_left(self) -> float:
        """Return how long the run may go on at most."""
        self.read()
        wall_left = self._limits.wall_s - self.wall_s
        if self._cpu_before is None:
            return wall_left
        return min(wall_left, self._limits.cpu_s - self.cpu_s)

    def read(self) -> None:
        """Read both clocks; a worker that is gone leaves the last CPU time."""
        self.wall_s = time.monotonic() - self._started
        used = self._cpu()
        if used is not None and self._cpu_before is not None:
            self.cpu_s = used - self._cpu_before

    def _cpu(self) -> float | None:
        """Return the worker's CPU time."""
        return None if self._process is None else self._process.cpu_seconds()


def _sources(code: str) -> list[tuple[str, int | None]]:
    """Return the texts to try: with the last value shown, then as it is.

    Beside each stands the line after which the text is no longer the cell's.
    """
    plain: tuple[str, int | None] = (code + _SILENT, None)
    span = final_expression(code)
    if span is None:
        return [plain]
    start, end = span
    shown = code[:start] + _ECHO + code[start:end] + _SHOW
    return [(shown, code.count("\n", 0, end) + 1), plain]


def _did_not_parse(frames: Sequence[Frame]) -> bool:
    """Tell an error of the text as a whole, before anything ran, from one while running."""
    return bool(frames) and all(frame.function_name is None for frame in frames)


def _print_traceback(
    problem: MontyRuntimeError | MontySyntaxError,
    numbers: Sequence[int],
    last_line: int | None,
    err: Capture,
) -> None:
    """Write the traceback as CPython does, with the cell's own lines."""
    current = f"<python-input-{len(numbers) - 1}>"
    frames = [
        frame
        for frame in problem.traceback()
        if last_line is None or frame.filename != current or frame.line <= last_line
    ]
    ran = any(frame.function_name is not None for frame in frames)
    lines = ["Traceback (most recent call last):"] if ran else []
    for frame in frames[-MAX_TRACEBACK_FRAMES:]:
        lines += _frame_lines(frame, numbers)
    message = problem.display("type-msg")
    if len(message) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        message = f"{message[:half]}\n... [message cut] ...\n{message[-half:]}"
    lines.append(message)
    err.feed("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def _frame_lines(frame: Frame, numbers: Sequence[int]) -> list[str]:
    """Write one frame; an error of the text as a whole gets a caret."""
    found = _INPUT_NAME.fullmatch(frame.filename)
    name = f"<cell {numbers[int(found[1])]}>" if found else frame.filename
    where = f", in {frame.function_name}" if frame.function_name else ""
    lines = [f'  File "{name}", line {frame.line}{where}']
    source = (frame.source_line or "").partition("\n")[0]
    if source.strip():
        lines.append(f"    {source.replace(_ECHO, '', 1).strip()}")
        if frame.function_name is None:
            indent = len(source) - len(source.lstrip())
            lines.append(" " * (4 + max(0, frame.column - 1 - indent)) + "^")
    return lines
