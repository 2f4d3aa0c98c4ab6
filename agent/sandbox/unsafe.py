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

import os

from agent.processes import cpu_seconds
from agent.sandbox.base import Capabilities, Limits, states_kept
from agent.sandbox.child import Child, Outcome
from agent.sandbox.history import History, check_replay
from agent.sandbox.sessions import HistorySession, Sessions


class UnsafeMachine:
    """Runs the cells of one session in at most one live child.

    Parameters
    ----------
    limits : Limits
        Bounds of every run.
    seed : int
        Fixes string hashing, ``random`` and ``numpy.random``.
    """

    def __init__(self, limits: Limits, seed: int) -> None:
        self._limits, self._seed = limits, seed
        self._child: Child | None = None
        self._child_node = 0

    async def run(self, history: History, node: int, code: str) -> Outcome:
        """Run ``code`` in the state ``node``, in the live child or a fresh one."""
        number = len(history)
        try:
            child = await self._child_at(history, node)
            outcome = await child.run(code, number)
        except BaseException:  # cancelled or broken: the child's state is unknown
            self.close()
            raise
        if outcome.status in ("ok", "error"):
            self._child_node = number
        else:
            self.close()
        return outcome

    def branch(self) -> UnsafeMachine:
        """Return a machine without a child, which is started at its first run."""
        return UnsafeMachine(self._limits, self._seed)

    def close(self) -> None:
        """End the live child, if any."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    async def _child_at(self, history: History, node: int) -> Child:
        """Return a live child in the state ``node``, starting and replaying where needed."""
        child = self._child
        if child is not None and self._child_node == node and child.alive:
            return child
        self.close()
        child = self._child = Child(self._limits, self._seed)
        await child.ready()
        for number, cell in history.path(node):
            check_replay(number, cell, await child.run(cell.code, number))
        self._child_node = node
        return child


class UnsafeSandbox:
    """Makes sessions without isolation.

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
        self._sessions = Sessions(max_running=max_running)

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> HistorySession:
        """Return a session in the empty state; its child starts at the first run.

        The latest state alone stays alive, whatever ``retain`` asks for.
        """
        states_kept(retain)
        return self._sessions.open(UnsafeMachine(limits, seed), History())

    async def close(self) -> None:
        """End every session."""
        await self._sessions.close()
