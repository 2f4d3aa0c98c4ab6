"""What runs untrusted code: sessions whose states form a tree of nodes.

Every successful or failed run adds a node; a node can be run from again or branched. A backend
that cannot keep states alive restores them by replaying the codes on the path to the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


class SandboxError(Exception):
    """The sandbox itself broke (not the code in it)."""


Status = Literal["ok", "error", "timeout", "memory", "crash", "output_limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of one run."""

    cpu_s: float = 5.0
    """CPU time, seconds: the main limit (wall clock under load gives false time-outs)."""
    wall_s: float = 30.0
    """Wall-clock backstop, seconds."""
    memory_mb: int = 1024
    """Address space, MiB."""
    output_chars: int = 4000
    """Characters of stdout and of stderr kept; the middle is cut out with a marker."""
    file_mb: int = 16
    """Largest file the code may write, MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run of code did."""

    node: int
    """Id of the state after the run; after a time-out or crash, the state before it."""
    status: Status
    stdout: str
    """Printed text, and the value of a final expression as a notebook echoes it."""
    stderr: str
    """Traceback trimmed to the code's own frames, and printed errors."""
    error: str | None
    """Exception class name, or the status for a limit; None when ``ok``."""
    cpu_s: float
    wall_s: float


class Session(Protocol):
    """Notebook-like state of one episode."""

    async def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), adding a node.

        Raises
        ------
        SandboxError
            If the sandbox broke.
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

    async def open(self, limits: Limits, seed: int) -> Session:
        """Start a session with an empty state."""
        ...

    async def close(self) -> None:
        """End every session."""
        ...
