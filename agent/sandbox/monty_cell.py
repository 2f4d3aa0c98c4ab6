"""One worker of the `monty` backend: loading a state, running a cell within limits, dumping."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from agent.processes import cpu_seconds
from agent.sandbox.base import Limits, Status
from agent.sandbox.child import CHECK_SECONDS, MAX_OUTPUT_BYTES, Outcome
from agent.sandbox.echo import final_expression
from agent.sandbox.output import Capture

if TYPE_CHECKING:
    from pydantic_monty import AsyncMontySession, Frame, MontyRuntimeError, MontySyntaxError

MAX_TRACEBACK_FRAMES = 8
TRANSFER_SECONDS = 60.0
"""A dump or load takes about 7 ms per MB; a loaded machine may take long."""

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
    """A worker checked out for one cell and the replays before it.

    Parameters
    ----------
    session : AsyncMontySession
        Fresh.
    limits : Limits
        Bounds of every run.
    """

    def __init__(self, session: AsyncMontySession, limits: Limits) -> None:
        self._session, self._limits = session, limits
        self._pid = session.worker_pid
        self._numbers: tuple[int, ...] = ()

    async def load(self, state: State | None) -> None:
        """Bring the worker to a state whose dump is kept, or to the empty one."""
        async with asyncio.timeout(TRANSFER_SECONDS):
            if state is None or state.dump is None:
                await self._session.feed_run(_SETUP)
                self._numbers = (0,)
            else:
                await self._session.load_session(state.dump)
                self._numbers = state.numbers

    async def run(self, code: str, number: int) -> Outcome:
        """Run a cell; after any status but ``ok`` and ``error`` the state is lost."""
        from pydantic_monty import MontyCrashedError, MontyRuntimeError, MontySyntaxError

        loop, limits = asyncio.get_running_loop(), self._limits
        out, err = Capture(limits.output_chars), Capture(limits.output_chars)
        clock = _Clock(self._pid, limits, loop)
        status: Status = "ok"
        error: str | None = None
        for source, last_line in _sources(code):
            self._numbers += (number,)
            try:
                limit = await self._feed(source, clock, out, err)
                status, error = limit or "ok", limit
            except MontyCrashedError as problem:
                status = error = "crash"
                exit_code = problem.exit_status
                reason = "by a signal" if exit_code is None else f"exit code {exit_code}"
                err.feed(f"the interpreter died ({reason})\n".encode())
            except (MontyRuntimeError, MontySyntaxError) as problem:
                if last_line is not None and _did_not_parse(problem):
                    continue  # the last statement is no expression: run the cell as it is
                status, error = self._ending(problem, clock)
                if status != "timeout":
                    _print_traceback(problem, self._numbers, last_line, err)
            break
        return Outcome(
            status=status,
            error=error,
            stdout=out.text(),
            stderr=err.text(),
            cpu_s=clock.cpu_s,
            wall_s=clock.wall_s,
        )

    async def run_and_dump(self, code: str, number: int) -> tuple[Outcome, State | None]:
        """Run a cell; return the state after it too, or None where there is none."""
        from pydantic_monty import MontyError

        outcome = await self.run(code, number)
        if outcome.status not in ("ok", "error"):
            return outcome, None
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                return outcome, State(await self._session.dump(), self._numbers)
        except (MontyError, RuntimeError):  # its frame or the worker's memory is too small
            note = f"{outcome.stderr}the state is too large to be kept\n"
            return replace(outcome, status="crash", error="crash", stderr=note), None

    async def _feed(
        self, source: str, clock: _Clock, out: Capture, err: Capture
    ) -> Literal["timeout", "output_limit"] | None:
        """Run a text in the worker; return the limit it crossed, which ends the worker."""
        loop, flooded = asyncio.get_running_loop(), False

        def on_print(stream: str, text: str) -> None:  # called in a thread of the pool
            nonlocal flooded
            capture = out if stream == "stdout" else err
            if capture.num_bytes <= MAX_OUTPUT_BYTES:
                capture.feed(text.encode(errors="backslashreplace"))
            elif not flooded:
                flooded = True
                loop.call_soon_threadsafe(feed.cancel)

        feed = asyncio.ensure_future(self._session.feed_run(source, print_callback=on_print))
        try:
            while (left := clock.seconds_left()) > 0:
                low, high = CHECK_SECONDS
                done, _ = await asyncio.wait((feed,), timeout=min(max(left, low), high))
                if flooded:
                    return "output_limit"
                if done:
                    feed.result()
                    return None
            return "timeout"
        finally:
            clock.stop()
            feed.cancel()
            await asyncio.wait((feed,))

    def _ending(
        self, problem: MontyRuntimeError | MontySyntaxError, clock: _Clock
    ) -> tuple[Status, str]:
        """Tell an exception of the code from a limit that the worker itself noticed."""
        if self._session.worker_pid is None:  # out of memory where it could not go on
            return "crash", "crash"
        name = problem.display("type-msg").partition(":")[0].strip()
        if name == "TimeoutError" and clock.wall_s >= clock.worker_limit_s:
            return "timeout", "timeout"
        return "error", name.rpartition(".")[2][:80]


class _Clock:
    """The clocks of one run: wall, and CPU of the worker where the system shows it.

    Parameters
    ----------
    pid : int or None
        The worker.
    limits : Limits
        Bounds of the run.
    loop : asyncio.AbstractEventLoop
        Whose clock is used.
    """

    def __init__(self, pid: int | None, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._pid, self._limits, self._loop = pid, limits, loop
        self._started, self._cpu_before = loop.time(), self._cpu()
        self.worker_limit_s = limits.cpu_s if self._cpu_before is None else limits.wall_s
        self.cpu_s = 0.0
        """CPU time used, seconds; 0 where it cannot be read."""
        self.wall_s = 0.0
        """Wall-clock time used, seconds."""

    def seconds_left(self) -> float:
        """Return how long the run may go on at most."""
        self.stop()
        wall_left = self._limits.wall_s - self.wall_s
        if self._cpu_before is None:
            return wall_left
        return min(wall_left, self._limits.cpu_s - self.cpu_s)

    def stop(self) -> None:
        """Read both clocks; a worker that is gone leaves the last CPU time."""
        self.wall_s = self._loop.time() - self._started
        used = self._cpu()
        if used is not None and self._cpu_before is not None:
            self.cpu_s = used - self._cpu_before

    def _cpu(self) -> float | None:
        """Return the worker's CPU time."""
        return None if self._pid is None else cpu_seconds(self._pid)


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


def _did_not_parse(problem: MontyRuntimeError | MontySyntaxError) -> bool:
    """Tell an error of the text as a whole, before anything ran, from one while running."""
    return all(frame.function_name is None for frame in problem.traceback())


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
    lines.append(problem.display("type-msg"))
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
