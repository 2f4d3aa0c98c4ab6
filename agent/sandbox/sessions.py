"""Sessions as a history of cells and a machine that runs the next one from any state in it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from agent.sandbox.base import Result, SandboxError
from agent.sandbox.child import Outcome
from agent.sandbox.history import History


class Machine(Protocol):
    """What runs the cells of one session."""

    async def run(self, history: History, node: int, code: str) -> Outcome:
        """Run ``code`` in the state ``node``.

        A run that ends ``ok`` or ``error`` becomes the node ``len(history)``; after any other
        ending, an exception or a cancellation nothing of it is left running and the machine is
        able to restore ``node``.
        """
        ...

    def branch(self) -> Machine:
        """Return a machine for a session that starts with the same history."""
        ...

    def close(self) -> None:
        """End what the machine keeps between runs; may be called twice, but not during a run."""
        ...


class Sessions:
    """The open sessions of a sandbox, and the bound on cells that run at the same time.

    Parameters
    ----------
    max_running : int
        Cells that run at the same time, >= 1; more wait, and their clocks do not run.
    """

    def __init__(self, *, max_running: int) -> None:
        self._max_running = max_running
        self._open: set[HistorySession] = set()
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    def open(self, machine: Machine, history: History, latest: int = 0) -> HistorySession:
        """Begin a session in the state ``latest`` of ``history``."""
        session = HistorySession(self, machine, history, latest)
        self._open.add(session)
        return session

    def forget(self, session: HistorySession) -> None:
        """Drop a closed session."""
        self._open.discard(session)

    def slot(self) -> asyncio.Semaphore:
        """Return the running loop's bound on cells that run at the same time."""
        return self._slots.setdefault(
            asyncio.get_running_loop(), asyncio.Semaphore(self._max_running)
        )

    async def close(self) -> None:
        """End every session."""
        for session in list(self._open):
            await session.close()
        self._slots.clear()


class HistorySession:
    """One notebook: a tree of cells that have run, and the machine that runs the next."""

    def __init__(self, sessions: Sessions, machine: Machine, history: History, latest: int) -> None:
        self._sessions, self._machine = sessions, machine
        self._history, self._latest = history, latest
        self._running: asyncio.Future[Outcome] | None = None
        self._closed = False
        self._lock = asyncio.Lock()

    async def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), adding a node.

        Raises
        ------
        SandboxError
            If the sandbox broke, the session is closed, or a replay gives another result than
            the first time.
        ValueError
            If there is no such node.
        """
        async with self._lock, self._sessions.slot():
            self._check_open()
            node = self._history.checked(self._latest if at is None else at)
            outcome = await self._run(node, code)
            if outcome.status in ("ok", "error"):
                node = self._history.add(node, code, outcome)
            self._latest = node
        return Result(
            node=node,
            status=outcome.status,
            source=outcome.source,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            error=outcome.error,
            cpu_s=outcome.cpu_s,
            wall_s=outcome.wall_s,
        )

    async def branch(self, node: int | None = None) -> HistorySession:
        """Return an independent session that starts in the state ``node`` (default: latest)."""
        self._check_open()
        start = self._history.checked(self._latest if node is None else node)
        return self._sessions.open(self._machine.branch(), self._history.copy(), start)

    async def close(self) -> None:
        """End the session and the run in progress; may be called twice."""
        self._closed = True
        self._sessions.forget(self)
        running = self._running
        if running is not None and not running.get_loop().is_closed():
            # The machine ends what it keeps itself, in the order its event loop needs.
            if running.get_loop() is not asyncio.get_running_loop():
                running.get_loop().call_soon_threadsafe(running.cancel)
                return
            running.cancel()
            await asyncio.wait((running,))
        self._machine.close()

    def _check_open(self) -> None:
        """Refuse to work in a closed session."""
        if self._closed:
            raise SandboxError("the session is closed")

    async def _run(self, node: int, code: str) -> Outcome:
        """Run a cell in a way that `close` can end."""
        self._running = asyncio.ensure_future(self._machine.run(self._history, node, code))
        try:
            return await self._running
        except asyncio.CancelledError:
            self._check_open()  # closed, not cancelled by the caller
            raise
        finally:
            self._running = None
