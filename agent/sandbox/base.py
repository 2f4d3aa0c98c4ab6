"""What runs untrusted code: sessions whose states form a tree of nodes.

Every run that ends by itself adds a node; a node can be run from again or branched. A backend
keeps some states alive and restores the others by replaying the codes on the path to the node,
each checked against what it did the first time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from trajectory.errors import InputError


class SandboxError(Exception):
    """The sandbox itself broke (not the code in it)."""


class ReplayDiverged(SandboxError):
    """A cell gave another result when it was replayed, so its state cannot be restored."""


Status = Literal["ok", "error", "timeout", "crash", "output_limit"]
"""How a run ended: by itself, with an exception, or by one of the limits."""

Source = Literal["kernel", "runner"]
"""Who says so. ``kernel``: clocks, signals and exit codes seen from outside. ``runner``: the
process that ran the code, which hostile code may have made to lie about itself; nothing may be
rewarded for a status from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of one run."""

    cpu_s: float = 5.0
    """CPU time, seconds: the main limit (wall clock under load gives false time-outs)."""
    wall_s: float = 30.0
    """Wall-clock backstop, seconds."""
    memory_mb: int = 1024
    """Address space above that of an idle interpreter, MiB."""
    output_chars: int = 4000
    """Characters of stdout and of stderr kept; the middle is cut out with a marker."""
    file_mb: int = 16
    """Largest file the code may write, MiB."""
    scratch_mb: int = 64
    """All files of a session together, MiB, where the backend can hold that."""
    threads: int = 32
    """Threads of a session, where the backend can hold that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run of code did."""

    node: int
    """Id of the state after the run; after a time-out or crash, the state before it."""
    status: Status
    source: Source
    stdout: str
    """Printed text, and the value of a final expression as a notebook echoes it."""
    stderr: str
    """Traceback trimmed to the code's own frames, printed errors, and how the interpreter died."""
    error: str | None
    """Exception class name, or the status for a limit; None when ``ok``."""
    cpu_s: float
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a backend can do; what it cannot is refused or absent, never pretended."""

    stateful: bool
    """The latest state is kept; where False, every run first repeats all runs before it."""
    forks: bool
    """A branch copies its state; where False, the state is rebuilt by replaying the codes."""
    cpython: bool
    """Code runs in CPython, so it has the whole language, standard library and the system's own
    functions; where False, in an interpreter of a part of the language."""
    packages: bool
    """Packages with compiled parts can be imported where they are installed (numpy, sympy)."""
    files: bool
    """Code can keep files in a private folder."""
    cpu_limit: bool
    """CPU time is bounded; where False only wall clock is, which a busy machine uses up."""


class Session(Protocol):
    """Notebook-like state of one episode."""

    async def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), adding a node.

        Raises
        ------
        SandboxError
            If the sandbox broke.
        ValueError
            If there is no such node.
        """
        ...

    async def branch(self, node: int | None = None) -> Session:
        """Return an independent session that starts in the state ``node`` (default: latest)."""
        ...

    async def close(self) -> None:
        """End the session and every process it started; may be called twice."""
        ...


class Sandbox(Protocol):
    """A way to run untrusted code."""

    name: str
    isolation: str
    """``none`` for the unsafe backend; stamped into trajectories and manifests."""
    capabilities: Capabilities

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> Session:
        """Start a session with an empty state.

        Parameters
        ----------
        limits : Limits
            Bounds of every run.
        seed : int
            Fixes string hashing, ``random`` and ``numpy.random``.
        retain : str, default="last"
            Which states stay alive: ``last`` (one episode), ``all`` (every state will be branched)
            or ``lru:N``. Others are restored by replay when they are asked for.

        Raises
        ------
        SandboxError
            If it cannot be started.
        InputError
            If ``retain`` is none of these, or a limit is one the backend cannot hold.
        """
        ...

    async def close(self) -> None:
        """End every session."""
        ...


def states_kept(retain: str) -> int | None:
    """Return how many states a retention keeps alive; None for all.

    Raises
    ------
    InputError
        If it is none of ``last``, ``all`` and ``lru:N`` with N >= 1.

    Examples
    --------
    >>> states_kept("last"), states_kept("lru:8"), states_kept("all")
    (1, 8, None)
    """
    if retain in ("last", "all"):
        return 1 if retain == "last" else None
    found = re.fullmatch(r"lru:([1-9]\d*)", retain)
    if found is None:
        raise InputError(f"unknown retention {retain!r}; valid: last, all, lru:N with N >= 1")
    return int(found[1])
