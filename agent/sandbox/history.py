"""The cells a session has run, as a tree: what any state is restored from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from agent.sandbox.base import ReplayDiverged
from agent.sandbox.output import mask_addresses

Seen = tuple[str, str | None, str]
"""Status, error and stdout of a run, addresses masked."""


class Ran(Protocol):
    """Anything that says how a run ended."""

    @property
    def status(self) -> str:
        """How it ended."""
        ...

    @property
    def error(self) -> str | None:
        """What was raised."""
        ...

    @property
    def stdout(self) -> str:
        """What it printed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: the state it started from, its code, and what it was seen to do."""

    parent: int
    code: str
    seen: Seen


def seen(ran: Ran) -> Seen:
    """Return what a replay has to reproduce; memory addresses may differ."""
    return ran.status, ran.error, mask_addresses(ran.stdout)


class History:
    """Cells by node; node 0 is the empty state and has no cell.

    Parameters
    ----------
    cells : iterable of Cell, default=()
        Cells of nodes 1, 2 ...
    """

    def __init__(self, cells: Iterable[Cell] = ()) -> None:
        self._cells = list(cells)

    def __len__(self) -> int:
        """Return the number of nodes, the empty state included."""
        return len(self._cells) + 1

    def copy(self) -> History:
        """Return an independent history of the same cells."""
        return History(self._cells)

    def add(self, parent: int, code: str, ran: Ran) -> int:
        """Add the node that ``code`` led to from ``parent`` and return it."""
        self._cells.append(Cell(parent=parent, code=code, seen=seen(ran)))
        return len(self._cells)

    def checked(self, node: int) -> int:
        """Return ``node`` if it exists.

        Raises
        ------
        ValueError
            If it does not.
        """
        if not 0 <= node < len(self):
            raise ValueError(f"no node {node}: this session has 0 to {len(self) - 1}")
        return node

    def parent(self, node: int) -> int:
        """Return the node before ``node`` (>= 1)."""
        return self._cells[node - 1].parent

    def path(self, node: int, *, after: int = 0) -> list[tuple[int, Cell]]:
        """Return the nodes and cells that lead from ``after``, an ancestor, to ``node``."""
        path = []
        while node != after:
            cell = self._cells[node - 1]
            path.append((node, cell))
            node = cell.parent
        return path[::-1]


def check_replay(node: int, cell: Cell, ran: Ran) -> None:
    """Insist that a replayed cell did what it did the first time.

    Raises
    ------
    ReplayDiverged
        If it did not.
    """
    if seen(ran) != cell.seen:
        raise ReplayDiverged(
            f"cell {node} gave another result when it was replayed ({ran.status}, then "
            f"{cell.seen[0]}): its state cannot be restored"
        )
