"""One runner process: starting it, one run with limits enforced from outside, ending it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.processes import CHILD_ENVIRONMENT, cpu_seconds, end_group, has_ended
from agent.sandbox.base import Limits, SandboxError, Source, Status
from agent.sandbox.output import Capture

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_OUTPUT_BYTES = 16 * 2**20
"""A run that prints more than this to one stream is stopped."""
MAX_FRAME_BYTES = 4096
"""No honest reply is longer."""
START_SECONDS = 60.0
"""A fresh interpreter takes 20 ms; a loaded machine may take long."""
CHECK_SECONDS = (0.02, 0.25)
"""Shortest and longest pause between two looks at the child's CPU clock."""
RUNNER = Path(__file__).with_name("runner.py")


class ProtocolError(Exception):
    """The child closed its control socket or sent something that is not a reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one run in a child ended."""

    status: Status
    error: str | None
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float

    @property
    def source(self) -> Source:
        """Who says so: the child of its own runs, the kernel of everything that ended them."""
        return "runner" if self.status in ("ok", "error") else "kernel"


class Child:
    """A runner process with its pipes and its private working folder.

    Parameters
    ----------
    limits : Limits
        Bounds of every run.
    seed : int
        Seeds string hashing, ``random`` and ``numpy.random`` of the child.

    Raises
    ------
    SandboxError
        If the process cannot be started.
    """

    def __init__(self, limits: Limits, seed: int) -> None:
        self._limits = limits
        self._cpu_seen = 0.0
        with ExitStack() as undo:  # also reached half-way, when descriptors run out
            try:
                self._folder = tempfile.mkdtemp(prefix="sandbox-")
                undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
                self._process, self._control, self._pipes = self._start(seed, undo)
            except OSError as error:
                raise SandboxError(f"cannot start the runner: {error}") from error
            self._undo = undo.pop_all()

    def _start(
        self, seed: int, undo: ExitStack
    ) -> tuple[subprocess.Popen[bytes], socket.socket, tuple[int, int]]:
        """Start the process; return it with our ends of its socket, stdout and stderr."""
        control, theirs = socket.socketpair()
        undo.callback(control.close)
        with theirs, ExitStack() as handed_over:
            ends = []
            for _ in range(2):
                ours, end = os.pipe()
                undo.callback(os.close, ours)
                handed_over.callback(os.close, end)
                os.set_blocking(ours, False)
                ends.append((ours, end))
            (out, out_theirs), (err, err_theirs) = ends
            process = subprocess.Popen(  # noqa: S603  (our own runner, no shell)
                [sys.executable, "-s", "-P", str(RUNNER), self._config(theirs.fileno(), seed)],
                stdin=subprocess.DEVNULL,
                stdout=out_theirs,
                stderr=err_theirs,
                pass_fds=(theirs.fileno(),),
                cwd=self._folder,
                env=self._environment(seed),
                start_new_session=True,
            )
        undo.callback(end_group, process)
        control.setblocking(False)
        return process, control, (out, err)

    async def ready(self) -> None:
        """Wait until the child can run code.

        Raises
        ------
        SandboxError
            If it dies or stays silent.
        """
        try:
            frame = await asyncio.wait_for(self._read_frame(), START_SECONDS)
        except (ProtocolError, TimeoutError) as error:
            capture = Capture(2000)
            self._drain(self._pipes[1], capture)
            raise SandboxError(f"the runner did not start: {capture.text() or error}") from error
        if frame.get("token") != "ready":
            raise SandboxError(f"the runner sent {frame} instead of 'ready'")

    @property
    def alive(self) -> bool:
        """False where something killed the idle child: the kernel, or its parent thread's end."""
        return not has_ended(self._process)

    async def run(self, code: str, number: int) -> Outcome:
        """Run one cell; after any status but ``ok`` and ``error`` the child must be ended."""
        loop = asyncio.get_running_loop()
        for fd in self._pipes:  # what threads of earlier runs printed belongs to nobody
            self._drain(fd, Capture(2))
        captures = tuple(Capture(self._limits.output_chars) for _ in self._pipes)
        started, cpu_before = loop.time(), cpu_seconds(self._process.pid) or 0.0
        self._cpu_seen = cpu_before
        exchange = asyncio.ensure_future(self._exchange(code, number))
        with self._reading(captures, on_flood=exchange.cancel):
            try:
                status, error = await self._supervise(exchange, started, cpu_before)
            finally:
                exchange.cancel()
                # At once: its own clean-up comes a step of the loop later, when the descriptor may
                # be closed and taken by another child, whose replies would then go unnoticed.
                loop.remove_reader(self._control)
                loop.remove_writer(self._control)
        wall_s = loop.time() - started
        cpu_s = self._cpu_time() - cpu_before
        stderr = self._finish(captures, status)
        return Outcome(
            status=status,
            error=error,
            stdout=captures[0].text(),
            stderr=stderr,
            cpu_s=cpu_s,
            wall_s=wall_s,
        )

    def close(self) -> None:
        """Kill the process group, close the pipes and remove the folder; may be called twice."""
        self._undo.close()

    def _config(self, control: int, seed: int) -> str:
        """Return the runner's argument."""
        return json.dumps(
            {
                "control": control,
                "parent": os.getpid(),
                "seed": seed,
                "cpu_s": self._limits.cpu_s,
                "memory_bytes": self._limits.memory_mb * 2**20,
                "file_bytes": self._limits.file_mb * 2**20,
            }
        )

    def _environment(self, seed: int) -> dict[str, str]:
        """Return the child's whole environment."""
        return {
            **CHILD_ENVIRONMENT,
            "HOME": self._folder,
            "TMPDIR": self._folder,
            "PYTHONHASHSEED": str(seed % 2**32),
        }

    async def _exchange(self, code: str, number: int) -> dict[str, object]:
        """Send a cell and return the reply that carries its token."""
        token = secrets.token_hex(8)
        request = {"token": token, "number": number, "code": code}
        body = json.dumps(request).encode()
        try:
            await asyncio.get_running_loop().sock_sendall(
                self._control, struct.pack("<I", len(body)) + body
            )
        except OSError as error:
            raise ProtocolError("the control socket is closed") from error
        frame = await self._read_frame()
        if frame.pop("token", None) != token or frame.get("status") not in (
            "ok",
            "error",
        ):
            raise ProtocolError("a reply that answers nothing")
        return frame

    async def _read_frame(self) -> dict[str, object]:
        """Read one length-prefixed JSON object from the control socket."""
        (size,) = struct.unpack("<I", await self._read(4))
        if size > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {size} bytes")
        try:
            frame = json.loads(await self._read(size))
        except ValueError as error:
            raise ProtocolError("a frame that is not JSON") from error
        if not isinstance(frame, dict):
            raise ProtocolError("a frame that is not an object")
        return frame

    async def _read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes from the control socket."""
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size:
            try:
                chunk = await loop.sock_recv(self._control, size - len(data))
            except OSError as error:
                raise ProtocolError("the control socket is closed") from error
            if not chunk:
                raise ProtocolError("the control socket is closed")
            data += chunk
        return data

    async def _supervise(
        self, exchange: asyncio.Future[dict[str, object]], started: float, cpu_before: float
    ) -> tuple[Status, str | None]:
        """Wait for the reply, the child's death, or the first limit it crosses."""
        loop, limits = asyncio.get_running_loop(), self._limits
        while True:
            wall_left = started + limits.wall_s - loop.time()
            cpu_left = limits.cpu_s - (self._cpu_time() - cpu_before)
            if min(wall_left, cpu_left) <= 0:
                return "timeout", "timeout"
            low, high = CHECK_SECONDS
            pause = min(max(min(wall_left, cpu_left), low), high)
            done, _ = await asyncio.wait((exchange,), timeout=pause)
            if exchange.cancelled():
                return "output_limit", "output_limit"
            if done and exchange.exception() is None:
                return self._read_reply(exchange.result())
            if done and not isinstance(exchange.exception(), ProtocolError):
                exchange.result()  # raises
            if done or has_ended(self._process):
                return await self._cause_of_death()

    def _cpu_time(self) -> float:
        """Return the CPU time used so far; a dead child leaves what was seen last."""
        self._cpu_seen = cpu_seconds(self._process.pid) or self._cpu_seen
        return self._cpu_seen

    @staticmethod
    def _read_reply(frame: dict[str, object]) -> tuple[Status, str | None]:
        """Turn a reply into a status."""
        error = frame.get("error")
        status: Status = "ok" if frame["status"] == "ok" else "error"
        return status, None if error is None else str(error)[:80]

    async def _cause_of_death(self) -> tuple[Status, str | None]:
        """Name what ended a child that gave no reply, after a moment to end by itself."""
        self._cpu_time()
        for _ in range(20):
            if has_ended(self._process):
                break
            await asyncio.sleep(0.005)
        code = end_group(self._process)
        return ("timeout", "timeout") if code == -signal.SIGXCPU else ("crash", "crash")

    @contextmanager
    def _reading(
        self, captures: tuple[Capture, ...], on_flood: Callable[[], bool]
    ) -> Iterator[None]:
        """Drain both pipes while the body runs."""
        loop = asyncio.get_running_loop()

        def read(fd: int, capture: Capture) -> None:
            try:
                data = os.read(fd, 2**16)
            except BlockingIOError:
                return
            capture.feed(data)
            if capture.num_bytes > MAX_OUTPUT_BYTES:
                on_flood()
            if not data or capture.num_bytes > MAX_OUTPUT_BYTES:
                loop.remove_reader(fd)

        pairs = list(zip(self._pipes, captures, strict=True))
        for fd, capture in pairs:
            loop.add_reader(fd, read, fd, capture)
        try:
            yield
        finally:
            for fd, _ in pairs:
                loop.remove_reader(fd)

    def _finish(self, captures: tuple[Capture, ...], status: Status) -> str:
        """Take what is still in the pipes; return stderr with the reason of a crash."""
        for fd, capture in zip(self._pipes, captures, strict=True):
            self._drain(fd, capture)
        stderr = captures[1].text()
        if status != "crash":
            return stderr
        code = end_group(self._process)
        reason = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                reason = f"signal {signal.Signals(-code).name}"
        return f"{stderr}the interpreter died ({reason})\n"

    @staticmethod
    def _drain(fd: int, capture: Capture) -> None:
        """Read what is in the pipe now, without waiting."""
        with suppress(BlockingIOError):
            while capture.num_bytes <= MAX_OUTPUT_BYTES and (data := os.read(fd, 2**16)):
                capture.feed(data)
