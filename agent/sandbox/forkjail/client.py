"""One box as seen from the session: running cells in it, with clocks and caps held outside.

The wall clock, the flood of output and the patience for a snapshot to wake are watched here; CPU
time, signals and exit codes by the box's first process. Text comes through fresh pipes that are
drained while the cell runs and never parsed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.forkjail.frames import Frame, Reader, close_all, send
from agent.sandbox.output import Capture

MAX_OUTPUT_BYTES = 16 * 2**20
"""A cell that prints more than this to one stream is stopped."""
HELLO_S = 60.0
WAKE_S = 20.0
"""How long a snapshot may take to wake and clone itself: milliseconds on a free machine."""
GRACE_S = 20.0
"""How long a box may take to confirm a kill before it counts as lost."""


class BoxLost(SandboxError):
    """The box is gone, and its states with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a cell ended, as the box reports it."""

    frame: Frame
    cut: str
    """What was killed from here: ``wall``, ``output``; empty if the cell ended by itself."""
    stdout: str
    stderr: str
    wall_s: float


@dataclass(slots=True, eq=False)
class _Run:
    """What is waited for while a cell runs."""

    started: asyncio.Future[None]
    ended: asyncio.Future[Frame]


@dataclass(slots=True, eq=False)
class Box:
    """A box and the states in it.

    Parameters
    ----------
    sock : socket
        Our end; the box ends when it is closed.
    """

    sock: socket.socket
    version: int = 0
    """How often files of its scratch folder have changed; a state of an older version cannot be
    gone on from here, since forks share files."""
    sessions: int = 1
    """Sessions that have states here."""
    running: int = 0
    closed: bool = False
    _next: int = 1
    _holders: dict[int, int] = field(default_factory=dict)
    _runs: dict[int, _Run] = field(default_factory=dict)
    _reader: Reader = field(default_factory=Reader)
    _greeted: asyncio.Future[None] | None = None

    async def greet(self) -> None:
        """Wait until the box is ready.

        Raises
        ------
        BoxLost
            If it does not come up.
        """
        loop = asyncio.get_running_loop()
        self.sock.setblocking(False)
        self._greeted = loop.create_future()
        loop.add_reader(self.sock, self._read)
        try:
            await asyncio.wait_for(self._greeted, HELLO_S)
        except TimeoutError as error:
            self.close()
            raise BoxLost("a new box gave no sign of life") from error
        except BaseException:
            self.close()
            raise

    def hold(self, state: int) -> None:
        """Keep a state alive for one more session."""
        self._holders[state] = self._holders.get(state, 0) + 1

    def release(self, state: int) -> None:
        """End a state that no other session holds."""
        left = self._holders.get(state, 0) - 1
        if left > 0:
            self._holders[state] = left
        else:
            self._holders.pop(state, None)
            self._order({"t": "drop", "state": state})

    def leave(self) -> None:
        """Take one session's hands off; the last one ends the box."""
        self.sessions -= 1
        if self.sessions <= 0:
            self.close()

    def close(self) -> None:
        """End the box; may be called twice."""
        if self.closed:
            return
        self.closed = True
        if self._greeted is not None:
            loop = self._greeted.get_loop()
            if not loop.is_closed():
                loop.remove_reader(self.sock)
        self.sock.close()
        lost = BoxLost("the box has ended")
        waiting = [f for run in self._runs.values() for f in (run.started, run.ended)]
        for future in (self._greeted, *waiting):
            if future is not None and not future.done() and not future.get_loop().is_closed():
                future.set_exception(lost)
                future.exception()  # seen: whoever waits gets it all the same

    async def run(
        self, code: str, *, parent: int, number: int, limits: Limits
    ) -> tuple[int, Ended]:
        """Run a cell from a state (0: the empty one).

        Returns
        -------
        state : int
            The new state, if the cell ended by itself; the caller holds it.
        ended : Ended

        Raises
        ------
        BoxLost
            If the box ended.
        """
        loop = asyncio.get_running_loop()
        state, self._next = self._next, self._next + 1
        run = self._runs[state] = _Run(loop.create_future(), loop.create_future())
        flood: asyncio.Future[None] = loop.create_future()
        captures = (Capture(limits.output_chars), Capture(limits.output_chars))
        began = loop.time()
        self.running += 1
        try:
            with self._send_cell(code, state, parent, number) as pipes:
                with _draining(pipes, captures, flood):
                    cut = await self._watch(run, flood, limits.wall_s, state)
                frame = run.ended.result()
                for fd, capture in zip(pipes, captures, strict=True):
                    _drain(fd, capture)
        finally:
            self.running -= 1
            del self._runs[state]
            if not run.ended.done():  # cancelled
                self._order({"t": "kill", "state": state})
            flood.cancel()
        if frame["t"] == "done":
            self.hold(state)
        ended = Ended(
            frame=frame,
            cut=cut,
            stdout=captures[0].text(),
            stderr=captures[1].text(),
            wall_s=loop.time() - began,
        )
        return state, ended

    async def _watch(
        self, run: _Run, flood: asyncio.Future[None], wall_s: float, state: int
    ) -> str:
        """Wait for the end of a cell, killing it at a limit; return which one."""
        cut = ""
        await asyncio.wait(
            (run.started, run.ended), timeout=WAKE_S, return_when=asyncio.FIRST_COMPLETED
        )
        if run.started.done() and not run.ended.done():
            await asyncio.wait(
                (run.ended, flood), timeout=wall_s, return_when=asyncio.FIRST_COMPLETED
            )
            cut = "" if run.ended.done() else "output" if flood.done() else "wall"
        if not run.ended.done():
            self._order({"t": "kill", "state": state})
            await asyncio.wait((run.ended,), timeout=GRACE_S)
            if not run.ended.done():
                self.close()
        run.ended.result()
        return cut

    @contextmanager
    def _send_cell(
        self, code: str, state: int, parent: int, number: int
    ) -> Iterator[tuple[int, int]]:
        """Order a cell; yields our ends of its stdout and stderr."""
        with ExitStack() as ours, ExitStack() as theirs:
            try:
                source = os.memfd_create("cell")
                theirs.callback(os.close, source)
                data = memoryview(code.encode("utf-8", "surrogatepass"))
                while data:
                    data = data[os.write(source, data) :]
                os.lseek(source, 0, os.SEEK_SET)
                pipes, ends = [], []
                for _ in range(2):
                    read, write = os.pipe()
                    ours.callback(os.close, read)
                    theirs.callback(os.close, write)
                    os.set_blocking(read, False)
                    pipes.append(read)
                    ends.append(write)
            except OSError as error:
                raise SandboxError(f"cannot start a cell: {error}") from error
            frame = {"t": "run", "state": state, "parent": parent, "number": number, "fds": 3}
            self._order(frame, [*ends, source])
            theirs.close()
            yield pipes[0], pipes[1]

    def _order(self, frame: Frame, descriptors: list[int] | None = None) -> None:
        """Send an order; a box that cannot take it is lost, which its runs learn."""
        if self.closed:
            return
        try:
            send(self.sock, frame, descriptors or ())
        except OSError:
            self.close()

    def _read(self) -> None:
        """Take what the box says."""
        try:
            alive = self._reader.receive(self.sock)
        except BlockingIOError:
            return
        for frame, descriptors in self._reader.frames():
            close_all(descriptors)
            self._hear(frame)
        if not alive:
            self.close()

    def _hear(self, frame: Frame) -> None:
        """Tell whoever waits for it."""
        if frame["t"] == "hello":
            if self._greeted is not None and not self._greeted.done():
                self._greeted.set_result(None)
            return
        run = self._runs.get(frame["state"])
        if run is None:
            if frame["t"] == "done":  # of a run that was cancelled
                self._order({"t": "drop", "state": frame["state"]})
        elif frame["t"] == "started":
            if not run.started.done():
                run.started.set_result(None)
        elif not run.ended.done():
            run.ended.set_result(frame)


@contextmanager
def _draining(
    pipes: tuple[int, int], captures: tuple[Capture, Capture], flood: asyncio.Future[None]
) -> Iterator[None]:
    """Read both pipes while the body runs; too much output resolves ``flood``."""
    loop = asyncio.get_running_loop()

    def read(fd: int, capture: Capture) -> None:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        capture.feed(data)
        flooded = capture.num_bytes > MAX_OUTPUT_BYTES
        if flooded and not flood.done():
            flood.set_result(None)
        if not data or flooded:
            loop.remove_reader(fd)

    for fd, capture in zip(pipes, captures, strict=True):
        loop.add_reader(fd, read, fd, capture)
    try:
        yield
    finally:
        for fd in pipes:
            loop.remove_reader(fd)


def _drain(fd: int, capture: Capture) -> None:
    """Read what is in a pipe now, without waiting."""
    try:
        while capture.num_bytes <= MAX_OUTPUT_BYTES and (data := os.read(fd, 1 << 16)):
            capture.feed(data)
    except BlockingIOError:
        return
