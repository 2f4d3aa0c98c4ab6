"""The `monty` backend: an interpreter of a part of Python that has no access to the system.

Monty (the package ``pydantic-monty``) is a Python interpreter written in Rust. Code has no files,
network, processes, environment or compiled packages, because the interpreter has no such
functions, and it runs in worker processes: a crash or an endless loop ends a worker, never the
caller. It works wherever the package does, macOS included, and a call takes about a millisecond.

It does NOT protect against a memory-safety bug in the interpreter: a worker runs as the caller's
user, with the caller's environment. It has no generators, subclasses, ``del`` or ``sys.exit`` and
a part of the standard library; code that needs more gets an exception that says so. Where the
system shows no CPU clock of other processes (macOS), ``cpu_s`` bounds the wall clock of execution,
sleep aside. A worker that runs when the caller is killed ends within ``wall_s``.

A state is the interpreter's dump of itself, loaded into whichever worker runs the next cell: a
branch shares it, and a limit or crash takes nothing back. Dumps beyond a budget are dropped and
restored by replay.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from agent.processes import cpu_seconds
from agent.sandbox.base import Capabilities, Limits, SandboxError, states_kept
from agent.sandbox.child import Outcome
from agent.sandbox.history import Cell, History, check_replay
from agent.sandbox.monty_cell import MontyWorker, State
from agent.sandbox.sessions import HistorySession, Sessions
from trajectory.errors import InputError

if TYPE_CHECKING:
    from pydantic_monty import Monty, OSPolicy, ResourceLimits

T = TypeVar("T")

MAX_MEMORY_MB = 128
"""Largest heap, whatever the limits allow: the caller holds dumps of states."""
LOAD_FACTOR = 4
"""Memory a worker may use to load a state, over the bound of its heap, which the state brings."""
MAX_DUMP_BYTES = 2**30
"""Kept states of a sandbox together."""
MAX_DEPTH = 1000
"""Nested calls."""
MAX_SUSPENSIONS = 10_000
"""Sleeps of one cell."""


class StateBudget:
    """Drops the dumps of the states used least recently when all together are too large.

    Parameters
    ----------
    max_bytes : int
        All dumps together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[weakref.ref[State], int]] = OrderedDict()
        self.num_bytes = 0
        """Of the dumps kept."""
        # States end in whichever thread collects them, also within a method of this.
        self._lock = threading.RLock()

    def add(self, state: State) -> None:
        """Count a state until its last owner drops it."""
        key, size = id(state), len(state.dump or b"")
        with self._lock:
            self._kept[key] = (weakref.ref(state, lambda _: self._forget(key)), size)
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                oldest, (reference, _) = next(iter(self._kept.items()))
                self._forget(oldest)
                if (dropped := reference()) is not None:
                    dropped.dump = None

    def touch(self, state: State) -> None:
        """Make a state the one used most recently."""
        with self._lock:
            if id(state) in self._kept:
                self._kept.move_to_end(id(state))

    def _forget(self, key: int) -> None:
        """Stop counting a state."""
        with self._lock:
            _, size = self._kept.pop(key, (None, 0))
            self.num_bytes -= size


class MontyMachine:
    """Runs the cells of one session, each in a worker that loads the state it starts from.

    Parameters
    ----------
    sandbox : MontySandbox
        Whose workers and budget are used.
    limits : Limits
        Bounds of every run.
    seed : int
        Of ``random``.
    keep : int or None
        Latest states kept; None for all.
    """

    def __init__(self, sandbox: MontySandbox, limits: Limits, seed: int, keep: int | None) -> None:
        self._sandbox, self._limits, self._seed, self._keep = sandbox, limits, seed, keep
        self._states: OrderedDict[int, State] = OrderedDict()

    async def run(self, history: History, node: int, code: str) -> Outcome:
        """Load or rebuild the state ``node``, run the cell and keep the state after it."""
        from pydantic_monty import MontyError

        start, replayed = self._nearest(history, node)
        worker = MontyWorker(self._limits)
        number = len(history)

        def work(pool: Monty) -> tuple[Outcome, State | None]:
            bounds = self._bounds(LOAD_FACTOR if start else 1)
            with (
                pool.checkout(limits=bounds, os_policy=self._policy()) as session,
                worker.using(session),
            ):
                worker.load(start)
                for done, cell in replayed:
                    check_replay(done, cell, worker.run(cell.code, done))
                return worker.run_and_dump(code, number)

        try:
            outcome, state = await self._sandbox.do(worker, work)
        except (MontyError, OSError, RuntimeError) as error:
            raise SandboxError(f"a monty worker broke: {error}") from error
        if state is not None:
            self._keep_state(number, state)
        return outcome

    def branch(self) -> MontyMachine:
        """Return a machine that shares the states so far, which nothing changes."""
        copy = MontyMachine(self._sandbox, self._limits, self._seed, self._keep)
        copy._states = self._states.copy()
        return copy

    def close(self) -> None:
        """Drop the states; no worker is held between runs."""
        self._states.clear()

    def _nearest(self, history: History, node: int) -> tuple[State | None, list[tuple[int, Cell]]]:
        """Return the nearest state kept on the way to ``node``, and the cells after it."""
        replayed: list[tuple[int, Cell]] = []
        for number, cell in reversed(history.path(node)):
            state = self._states.get(number)
            if state is not None and (dump := state.dump) is not None:
                self._sandbox.budget.touch(state)
                # A copy: another session's state may push this dump out before it is loaded.
                return State(dump, state.numbers), replayed[::-1]
            replayed.append((number, cell))
        return None, replayed[::-1]

    def _keep_state(self, node: int, state: State) -> None:
        """Keep a state and drop the oldest beyond what is to be kept."""
        self._states[node] = state
        self._sandbox.budget.add(state)
        while self._keep is not None and len(self._states) > self._keep:
            self._states.popitem(last=False)

    def _bounds(self, memory_factor: int) -> ResourceLimits:
        """Return what the interpreter itself enforces; the clocks are watched from outside too."""
        limits = self._limits
        return {
            "max_feed_duration_secs": limits.wall_s if has_cpu_clock() else limits.cpu_s,
            "max_memory": min(limits.memory_mb, MAX_MEMORY_MB) * memory_factor * 2**20,
            "max_recursion_depth": MAX_DEPTH,
            "max_suspensions": MAX_SUSPENSIONS,
        }

    def _policy(self) -> OSPolicy:
        """Return how clocks, sleep and random numbers behave."""
        return {
            "sleep": "call_host",
            "process_time": "elapsed",
            "random_start": {"seed": self._seed},
        }


class MontySandbox:
    """Makes sessions of the Monty interpreter.

    Parameters
    ----------
    max_running : int
        Worker processes, >= 1: cells that run at the same time; more wait, and their clocks do
        not run.

    Raises
    ------
    InputError
        If the package is not installed.
    """

    def __init__(self, *, max_running: int) -> None:
        try:
            import pydantic_monty  # noqa: F401  (asked for before the first session)
        except ImportError as error:
            raise InputError(
                "the sandbox 'monty' needs a package that is not installed; "
                "install it with: pip install 'toolprm[monty]'"
            ) from error
        self.name = "monty"
        self.isolation = "interpreter"
        self.capabilities = Capabilities(
            stateful=True,
            forks=True,
            cpython=False,
            packages=False,
            files=False,
            cpu_limit=has_cpu_clock(),
        )
        self.budget = StateBudget(MAX_DUMP_BYTES)
        self._max_running = max_running
        self._sessions = Sessions(max_running=max_running)
        self._started: tuple[Monty, ThreadPoolExecutor] | None = None
        self._busy: set[MontyWorker] = set()

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> HistorySession:
        """Return a session in the empty state; ``file_mb`` and the like have nothing to bound."""
        machine = MontyMachine(self, limits, seed, states_kept(retain))
        return self._sessions.open(machine, History())

    async def close(self) -> None:
        """End every session and worker."""
        await self._sessions.close()
        started, self._started = self._started, None
        if started is not None:
            pool, threads = started
            for worker in list(self._busy):
                worker.kill("closed")
            await asyncio.get_running_loop().run_in_executor(None, threads.shutdown)
            pool.__exit__(None, None, None)

    async def do(self, worker: MontyWorker, work: Callable[[Monty], T]) -> T:
        """Do a worker's work in a thread, watched.

        Raises
        ------
        SandboxError
            If no worker can be started.
        """
        pool, threads = self._start()
        self._busy.add(worker)
        try:
            return await worker.watch(
                asyncio.get_running_loop().run_in_executor(threads, work, pool)
            )
        finally:
            self._busy.discard(worker)

    def _start(self) -> tuple[Monty, ThreadPoolExecutor]:
        """Return the workers and the threads that wait for them, started at the first call."""
        from pydantic_monty import Monty, MontyError

        if self._started is None:
            pool = Monty(max_processes=self._max_running)
            try:
                pool.__enter__()
            except (MontyError, OSError, RuntimeError) as error:
                raise SandboxError(f"cannot start a monty worker: {error}") from error
            self._started = pool, ThreadPoolExecutor(self._max_running, "monty")
        return self._started


def has_cpu_clock() -> bool:
    """Tell whether the CPU time of other processes can be read here."""
    return cpu_seconds(os.getpid()) is not None
