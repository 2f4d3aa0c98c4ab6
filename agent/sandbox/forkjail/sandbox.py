"""Sessions on boxes: which state lives where, and when one has to be made again.

A state is gone on from by fork where that is exact: its process lives, no file of the box has
changed since, and nobody has gone on from it while it held open files. Otherwise it is replayed
in a new box and checked against what was seen the first time. Sessions that were branched share a
box as long as none of them touches files; a run that could have seen another's files is done again
in a box of its own.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from dataclasses import dataclass

from agent.sandbox.base import (
    Capabilities,
    Limits,
    ReplayDiverged,
    Result,
    SandboxError,
    states_kept,
)
from agent.sandbox.forkjail.client import Box, BoxLost, Ended
from agent.sandbox.forkjail.ending import Ran, cause, killed_from_outside, verdict
from agent.sandbox.forkjail.process import MAX_STATES, PRELOAD, Zygote
from agent.sandbox.history import History, check_replay

ATTEMPTS = 3
"""How often a cell is begun again, in a new box, before the sandbox counts as broken."""
FELL_BACK = "[the state after the previous call could not be kept; variables are as before it]\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Alive:
    """A state that lives in the session's box."""

    state: int
    version: int
    """Of the box when the state was reached."""


class _Again(Exception):
    """A run that has to be done again in a new box."""


class _Stuck(_Again):
    """Likewise: the state it started from did not wake."""


class ForkjailSession:
    """One notebook, its states living in one box at a time."""

    def __init__(
        self,
        sandbox: ForkjailSandbox,
        limits: Limits,
        seed: int,
        history: History,
        keep: int | None,
    ) -> None:
        self._sandbox, self._limits, self._seed = sandbox, limits, seed
        self._history = history
        self._latest = 0
        self._keep = MAX_STATES if keep is None else min(keep, MAX_STATES)
        self._box: Box | None = None
        self._alive: OrderedDict[int, _Alive] = OrderedDict()
        self._stands_for: dict[int, int] = {}  # states that cannot be kept -> the one before
        self._closed = False
        self._lock = asyncio.Lock()

    async def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), adding a node.

        Raises
        ------
        SandboxError
            If no box can be had, or a replay gives another result than the first time.
        """
        if self._closed:
            raise SandboxError("the session is closed")
        async with self._lock, self._sandbox.slot():
            wanted = self._history.checked(self._latest if at is None else at)
            try:
                node, ended = await self._run_somewhere(wanted, code)
            finally:
                self._leave_if_closed()  # meanwhile: a new box may have been made since
            status, source, error = verdict(ended, self._limits)
            stderr = ended.stderr + cause(ended, status, self._limits)
            origin = self._standing(wanted)
            if origin != wanted:
                stderr = FELL_BACK + stderr
            result = Result(
                node=node,
                status=status,
                source=source,
                stdout=ended.stdout,
                stderr=stderr,
                error=error,
                cpu_s=float(ended.frame.get("cpu", 0.0)),
                wall_s=ended.wall_s,
            )
            self._latest = result.node
            return result

    async def branch(self, node: int | None = None) -> ForkjailSession:
        """Return an independent session in the state ``node``, which is not copied until it runs.

        Raises
        ------
        SandboxError
            If the session is closed.
        """
        if self._closed:
            raise SandboxError("the session is closed")
        async with self._lock:
            start = self._history.checked(self._latest if node is None else node)
            copy = self._sandbox.adopt(
                ForkjailSession(
                    self._sandbox, self._limits, self._seed, self._history.copy(), self._keep
                )
            )
            copy._latest = start
            copy._stands_for = dict(self._stands_for)
            box, alive = self._box, self._alive.get(self._standing(start))
            if box is not None and not box.closed and alive and alive.version == box.version:
                box.sessions += 1
                box.hold(alive.state)
                copy._box = box
                copy._alive[self._standing(start)] = alive
            return copy

    async def close(self) -> None:
        """End the session's states, and its box unless another session has states there."""
        self._closed = True
        self._leave_box()
        self._sandbox.forget(self)

    def _standing(self, node: int) -> int:
        """Return the node that is gone on from in place of ``node``."""
        while node in self._stands_for:
            node = self._stands_for[node]
        return node

    def _leave_if_closed(self) -> None:
        """Give up the box of a closed session."""
        if self._closed:
            self._leave_box()

    def _leave_box(self) -> None:
        """Give up the box and every state in it."""
        box, self._box = self._box, None
        if box is not None:
            if box.sessions > 1:
                for alive in self._alive.values():
                    box.release(alive.state)
            box.leave()
        self._alive.clear()

    async def _run_somewhere(self, wanted: int, code: str) -> tuple[int, Ended]:
        """Run a cell, in a new box if this one cannot do it; return the node it led to."""
        last: SandboxError | None = None
        stuck = 0
        for _ in range(ATTEMPTS):
            if self._closed:
                raise SandboxError("the session is closed")
            try:
                return await self._run_here(self._standing(wanted), code)
            except _Stuck:
                stuck += 1
                if stuck > 1 and (node := self._standing(wanted)):
                    self._stands_for[node] = self._history.parent(node)
            except _Again:
                pass
            except (BoxLost, ReplayDiverged) as error:
                last = error
            self._leave_box()
        words = self._sandbox.last_words()
        if isinstance(last, BoxLost) and words:
            raise SandboxError(f"{last}; last words: {words}")
        raise last or SandboxError("a cell could not be run: its state does not stay alive")

    async def _run_here(self, node: int, code: str) -> tuple[int, Ended]:
        """Run a cell from ``node``, restoring that state first where it is not alive."""
        box, state = await self._state_of(node)
        ended, reached = await self._cell(box, state, code, number=len(self._history))
        if ended.frame["t"] != "done" or ended.cut:
            return node, ended
        return self._keep_state(box, self._history.add(node, code, Ran(ended)), reached), ended

    async def _state_of(self, node: int) -> tuple[Box, int]:
        """Return a box and the state in it that is ``node``."""
        box = self._box
        if box is not None and not box.closed:
            alive = self._alive.get(node)
            if alive is not None and alive.version == box.version:
                self._alive.move_to_end(node)
                return box, alive.state
            if node == 0 and box.version == 0:
                return box, 0
        start, state = self._nearest(node)
        if box is None or box.closed or start is None:
            self._leave_box()
            box = self._box = await self._sandbox.new_box(self._limits, self._seed)
            start, state = 0, 0
        for number, cell in self._history.path(node, after=start):
            ended, state = await self._cell(box, state, cell.code, number=number)
            check_replay(number, cell, Ran(ended))
            self._keep_state(box, number, state)
        return box, state

    def _nearest(self, node: int) -> tuple[int | None, int]:
        """Return the nearest ancestor that is alive and its state, or None."""
        box = self._box
        if box is None or box.closed:
            return None, 0
        while node:
            alive = self._alive.get(node)
            if alive is not None and alive.version == box.version:
                return node, alive.state
            node = self._history.parent(node)
        return (0, 0) if box.version == 0 else (None, 0)

    async def _cell(self, box: Box, state: int, code: str, *, number: int) -> tuple[Ended, int]:
        """Run a cell and see to it that no other session had a part in what it saw.

        Raises
        ------
        _Again
            If it has to be done in another box.
        """
        version, alone = box.version, box.running == 0
        reached, ended = await box.run(code, parent=state, number=number, limits=self._limits)
        frame = ended.frame
        if frame["t"] == "no_parent":
            raise _Again
        if frame.get("why") == "no_clone":
            raise _Stuck
        if killed_from_outside(ended, self._limits):
            raise BoxLost(
                "something outside killed a cell: is the machine out of memory?"
                if frame["started"]
                else f"a cell did not begin: {(ended.stderr.splitlines() or ['no reason'])[-1]}"
            )
        touched = bool(frame.get("changed")) or version > 0
        if box.version != version or (touched and (box.sessions > 1 or not alone)):
            box.version += 1  # what is there now belongs to nobody in particular
            if frame["t"] == "done":
                box.release(reached)
            raise _Again
        box.version += touched
        return ended, reached

    def _keep_state(self, box: Box, node: int, state: int) -> int:
        """Note that ``node`` is alive, and end the states that are kept no longer."""
        self._alive[node] = _Alive(state=state, version=box.version)
        while len(self._alive) > self._keep:
            _, old = self._alive.popitem(last=False)
            box.release(old.state)
        return node


def _close_unused(made: asyncio.Future[socket.socket]) -> None:
    """Close the socket of a box that nobody waits for any more."""
    if not made.cancelled() and made.exception() is None:
        made.result().close()


class ForkjailSandbox:
    """Makes `ForkjailSession`s.

    Parameters
    ----------
    own_namespaces : bool
        Tier A (namespaces, Landlock where there is one, seccomp) or tier B (Landlock and
        seccomp).
    max_running : int
        Cells that run at the same time, >= 1; more wait, and their clocks do not run.
    preload : tuple of str, optional
        Modules imported once for all sessions.
    """

    def __init__(
        self, *, own_namespaces: bool, max_running: int, preload: tuple[str, ...] = PRELOAD
    ) -> None:
        self.name = "forkjail"
        self.isolation = "namespaces+seccomp" if own_namespaces else "landlock+seccomp"
        self.capabilities = Capabilities(
            stateful=True, forks=True, cpython=True, packages=True, files=True, cpu_limit=True
        )
        self._max_running = max_running
        self._zygote = Zygote(own_namespaces=own_namespaces, preload=preload)
        self._sessions: set[ForkjailSession] = set()
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    @property
    def pid(self) -> int | None:
        """The process whose descendants all cells are; None before the first cell."""
        return self._zygote.pid

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> ForkjailSession:
        """Return a session in the empty state; its box is made at the first run."""
        return self.adopt(ForkjailSession(self, limits, seed, History(), states_kept(retain)))

    async def close(self) -> None:
        """End every session, every box and the zygote."""
        for session in list(self._sessions):
            await session.close()
        self._slots.clear()
        await asyncio.to_thread(self._zygote.close)

    async def new_box(self, limits: Limits, seed: int) -> Box:
        """Return a fresh box.

        Raises
        ------
        SandboxError
            If there is none to be had.
        """
        if self._zygote.up:
            box = Box(self._zygote.new_box(limits, seed))
        else:
            made = asyncio.ensure_future(asyncio.to_thread(self._zygote.new_box, limits, seed))
            try:
                box = Box(await asyncio.shield(made))
            except asyncio.CancelledError:
                made.add_done_callback(_close_unused)
                raise
        await box.greet()
        return box

    def last_words(self) -> str:
        """Return the last complaint of the processes behind this sandbox."""
        return self._zygote.last_words()

    def slot(self) -> asyncio.Semaphore:
        """Return the running loop's bound on cells that run at the same time."""
        return self._slots.setdefault(
            asyncio.get_running_loop(), asyncio.Semaphore(self._max_running)
        )

    def adopt(self, session: ForkjailSession) -> ForkjailSession:
        """Count a session among those to close."""
        self._sessions.add(session)
        return session

    def forget(self, session: ForkjailSession) -> None:
        """Drop a closed session."""
        self._sessions.discard(session)
