"""The `unsafe` backend: a plain subprocess per session, for code you trust.

It protects the caller from accidents: each session is a fresh interpreter with an empty
environment and a private folder, its CPU time, wall clock, memory, output and file size are
limited, its process group is killed at any limit and at close, and it dies with the caller.

It does NOT protect against malice. The code runs as the calling user: it can read and write every
file that user can, use the network, start processes (one that calls ``setsid`` outlives the
session; there is no limit on their number, as RLIMIT_NPROC counts per user), send signals to the
user's other processes, fill the disk with many small files, raise its memory limit if that user
is root, and change the runner it shares a process with, so that its own later results are lies.
Threads it leaves behind may print into later turns. A caller killed by SIGKILL leaves behind the
session's temporary folder and the processes the code had started. Hence ``--allow-unsafe-tools``.

States are restored by replay: after a limit or crash, and in a branch, the codes on the path are
run again in a fresh child, and each must give the output it gave before.
"""

from __future__ import annotations

import asyncio
import os

from agent.processes import cpu_seconds
from agent.sandbox.base import Capabilities, Limits, Result, SandboxError, states_kept
from agent.sandbox.child import Child
from agent.sandbox.history import History, check_replay


class UnsafeSession:
    """One notebook: at most one live child, and the tree of codes that can rebuild any state."""

    def __init__(self, sandbox: UnsafeSandbox, limits: Limits, seed: int, history: History) -> None:
        self._sandbox, self._limits, self._seed = sandbox, limits, seed
        self._history = history
        self._latest = 0
        self._child: Child | None = None
        self._child_node = 0
        self._closed = False
        self._lock = asyncio.Lock()

    async def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), adding a node.

        Raises
        ------
        SandboxError
            If the child cannot be started, or a replay gives another result than the first time.
        """
        if self._closed:
            raise SandboxError("the session is closed")
        async with self._lock, self._sandbox.slot():
            node = self._history.checked(self._latest if at is None else at)
            try:
                child = await self._child_at(node)
                outcome = await child.run(code, len(self._history))
            except BaseException:  # cancelled or broken: the child's state is unknown
                self._end_child()
                raise
            if outcome.status in ("ok", "error"):
                node = self._child_node = self._history.add(node, code, outcome)
            else:
                self._end_child()
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

    async def branch(self, node: int | None = None) -> UnsafeSession:
        """Return an independent session in the state ``node``, rebuilt at its first run."""
        start = self._history.checked(self._latest if node is None else node)
        copy = self._sandbox.adopt(
            UnsafeSession(self._sandbox, self._limits, self._seed, self._history.copy())
        )
        copy._latest = start
        return copy

    async def close(self) -> None:
        """Kill the child; may be called twice."""
        self._closed = True
        self._end_child()
        self._sandbox.forget(self)

    def _end_child(self) -> None:
        """End the live child, if any."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    async def _child_at(self, node: int) -> Child:
        """Return a live child in the state ``node``, starting and replaying where needed."""
        child = self._child
        if child is not None and self._child_node == node and child.alive:
            return child
        self._end_child()
        child = self._child = Child(self._limits, self._seed)
        await child.ready()
        for number, cell in self._history.path(node):
            check_replay(number, cell, await child.run(cell.code, number))
        self._child_node = node
        return child


class UnsafeSandbox:
    """Makes `UnsafeSession`s.

    Parameters
    ----------
    max_running : int
        Cells that run at the same time, >= 1; more wait, and their clocks do not run.
    """

    def __init__(self, *, max_running: int) -> None:
        self.name = "unsafe"
        self.isolation = "none"
        self.capabilities = Capabilities(
            stateful=True,
            forks=False,
            cpython=True,
            packages=True,
            files=True,
            cpu_limit=cpu_seconds(os.getpid()) is not None,
        )
        self._max_running = max_running
        self._sessions: set[UnsafeSession] = set()
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> UnsafeSession:
        """Return a session in the empty state; its child starts at the first run.

        The latest state alone stays alive, whatever ``retain`` asks for.
        """
        states_kept(retain)
        return self.adopt(UnsafeSession(self, limits, seed, History()))

    async def close(self) -> None:
        """End every session."""
        for session in list(self._sessions):
            await session.close()
        self._slots.clear()

    def slot(self) -> asyncio.Semaphore:
        """Return the running loop's bound on cells that run at the same time."""
        return self._slots.setdefault(
            asyncio.get_running_loop(), asyncio.Semaphore(self._max_running)
        )

    def adopt(self, session: UnsafeSession) -> UnsafeSession:
        """Count a session among those to close."""
        self._sessions.add(session)
        return session

    def forget(self, session: UnsafeSession) -> None:
        """Drop a closed session."""
        self._sessions.discard(session)
