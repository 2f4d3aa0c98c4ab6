"""The append-only ledger of Monte-Carlo rollouts: one line per rollout, resumed as a difference.

A line is written when its rollout has ended, in one ``write``, so a killed process loses at most
the rollouts in flight; ``fsync`` follows at most every ``SYNC_EVERY_S`` seconds and at the end, so
a power cut loses at most that much more. What is left to do is the planned keys minus the keys
found here. In memory are only counts, one bit and one file offset per rollout, never the rollouts.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.store import (
    JsonlWriter,
    encode_line,
    read_at,
    read_jsonl,
    read_offsets,
    repair_tail,
)

SYNC_EVERY_S = 5.0
"""Longest time between two ``fsync`` while lines are written, seconds."""

ATTEMPTS = 2
"""A rollout that broken infrastructure ended is run this often in all."""

State: TypeAlias = tuple[str, int]
"""A state to continue from: (trajectory id, prefix), or (task id, 0), which all trajectories of a
task share. Prefix 0 never stands beside a trajectory id, so the two kinds of id cannot clash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """How one continuation of one state ended."""

    task_id: str
    trajectory_id: str | None
    """Trajectory that was continued; None at prefix 0, which all trajectories of a task share."""
    prefix: int
    """Steps kept before the continuation, >= 0."""
    rollout: int
    """Index among the continuations of this state, from 0."""
    completer: str
    """Model and weights that wrote the continuation."""
    attempt: int = 0
    """0, or 1 for the repetition of a rollout that broken infrastructure ended."""
    stop: StopReason
    outcome: float | None
    """The checker's verdict in [0, 1]; None where there is none."""
    answer: str | None = None
    """Final answer; None if there was none."""
    tokens: int
    """Tokens generated after the prefix."""
    tool_calls: int
    """Calls made after the prefix."""
    seed: int
    failure: str | None = None
    """What broke, if something did."""
    mismatch: bool = False
    """Whether that was a tool that answered a repeated call differently."""
    reached: tuple[str, ...] = ()
    """Digests of the states it came through after the prefix, its end aside: see
    `labeling.states`. Of those that its task's trajectories share, it is a rollout as well."""
    check: str = ""
    """Hash of all other fields, put in by the ledger: a line that was edited says so."""

    def __post_init__(self) -> None:
        if (self.trajectory_id is None) != (self.prefix == 0):
            raise ValueError("a rollout has a trajectory_id exactly where its prefix is not 0")
        if min(self.prefix, self.rollout, self.tokens, self.tool_calls) < 0:
            raise ValueError("prefix, rollout, tokens and tool_calls must be >= 0")
        if not 0 <= self.attempt < ATTEMPTS:
            raise ValueError(f"attempt must be in 0..{ATTEMPTS - 1}, not {self.attempt}")
        if self.stop.judged != (self.outcome is not None):
            raise ValueError(f"stop {self.stop.value!r} does not go with outcome {self.outcome}")

    @property
    def state(self) -> State:
        """The state that was continued."""
        return (self.trajectory_id or self.task_id, self.prefix)

    @property
    def right(self) -> bool:
        """Whether the checker accepted the answer."""
        return self.outcome is not None and self.outcome >= 0.5

    @property
    def abandons(self) -> bool:
        """Whether it shows that its state cannot be restored."""
        return self.mismatch and self.settled

    @property
    def settled(self) -> bool:
        """Whether this is the rollout's last attempt."""
        return not self.stop.failed or self.attempt == ATTEMPTS - 1


def sealed(rollout: Rollout) -> Rollout:
    """Return the rollout with its ``check``."""
    content = encode_line(replace(rollout, check=""))
    return replace(rollout, check=blake2b(content, digest_size=4).hexdigest())


def read_rollouts(path: Path) -> Iterator[tuple[int, Rollout]]:
    """Read a ledger, each rollout with the byte at which its line begins.

    Raises
    ------
    InputError
        If a line is malformed, or was changed after it was written; the message has its number.
    """
    for ordinal, (offset, rollout) in enumerate(read_offsets(path, Rollout)):
        if rollout.check and rollout != sealed(rollout):
            raise InputError(
                f"{path}, line {line_number(path, ordinal)}: rollout {rollout.rollout} of "
                f"{rollout.state[0]!r} after step {rollout.prefix} was changed after it was "
                "written: remove the line to have it run again"
            )
        yield offset, rollout


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of the rollouts of one state."""

    settled: int = 0
    """Bit ``k`` is set once rollout ``k`` needs no further attempt."""
    broken: int = 0
    """Bit ``k`` is set once the first attempt of rollout ``k`` failed."""
    correct: int = 0
    truncated: int = 0
    failed: int = 0
    tokens: int = 0
    """Generated by all attempts."""

    @property
    def rollouts(self) -> int:
        """Rollouts that are settled, of any ending."""
        return self.settled.bit_count()

    def has(self, rollout: Rollout) -> bool:
        """Tell whether this rollout, or this failed first attempt of it, is counted."""
        return bool((self.settled if rollout.settled else self.broken) >> rollout.rollout & 1)

    def add(self, rollout: Rollout) -> None:
        """Count one line."""
        self.tokens += rollout.tokens
        bit = 1 << rollout.rollout
        if not rollout.settled:
            self.broken |= bit
            return
        self.settled |= bit
        self.correct += rollout.right
        self.truncated += rollout.stop.truncated
        self.failed += rollout.stop.failed

    def missing(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (index, attempt) of the rollouts among the first ``count`` that are not settled."""
        for index in range(count):
            if not self.settled >> index & 1:
                yield index, self.broken >> index & 1


@dataclass(kw_only=True, slots=True)
class Totals:
    """Sums over a ledger, for reports."""

    rollouts: int = 0
    """Settled rollouts."""
    correct: int = 0
    truncated: int = 0
    failed: int = 0
    retried: int = 0
    """First attempts that failed and were repeated."""
    tokens: int = 0
    """Generated by all attempts."""
    tool_calls: int = 0

    def add(self, rollout: Rollout) -> None:
        """Count one line."""
        self.tokens += rollout.tokens
        self.tool_calls += rollout.tool_calls
        if not rollout.settled:
            self.retried += 1
            return
        self.rollouts += 1
        self.correct += rollout.right
        self.truncated += rollout.stop.truncated
        self.failed += rollout.stop.failed


@dataclass(kw_only=True, slots=True)
class _Contents:
    """What a pass over a ledger found."""

    tallies: dict[State, Tally] = field(default_factory=dict)
    offsets: dict[str, array[int]] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    duplicates: int = 0


class Ledger:
    """Counts of an evidence file, and its only writer.

    Parameters
    ----------
    path : Path
        The file; made if missing. An unterminated last line, left by a killed writer, is cut off.
    completer : str
        The one model whose rollouts belong in it.

    Raises
    ------
    InputError
        If a line is malformed, is by another completer, or says something else about a rollout
        than an earlier line; the message has the line number.
    """

    def __init__(self, path: Path, *, completer: str) -> None:
        self.path = path
        self.completer = completer
        self.cut_lines = repair_tail(path)
        """Unterminated lines dropped, 0 or 1."""
        contents = _read(path, completer) if path.exists() else _Contents()
        self.totals = contents.totals
        self.duplicates = contents.duplicates
        """Repeated lines passed over."""
        self._tallies = contents.tallies
        self._offsets = contents.offsets
        self._writer = JsonlWriter(path)
        self._unsynced = False
        self._synced_at = time.monotonic()

    def tally(self, state: State) -> Tally:
        """Return the counts of a state, all zero if it has no rollout yet."""
        return self._tallies.get(state) or Tally()

    @property
    def num_states(self) -> int:
        """States with at least one rollout."""
        return len(self._tallies)

    def rollouts_of(self, task_id: str) -> Iterator[Rollout]:
        """Read the rollouts of one task from the file, in the order they were written."""
        return read_at(self.path, Rollout, self._offsets.get(task_id, ()))

    def append(self, rollout: Rollout) -> None:
        """Write and count one rollout.

        Raises
        ------
        ValueError
            If it is by another completer or already there.
        OSError
            If the disk is full; the lines before stay.
        """
        if rollout.completer != self.completer:
            raise ValueError(f"{rollout.completer} is not this ledger's {self.completer}")
        tally = self._tallies.setdefault(rollout.state, Tally())
        if tally.has(rollout):
            raise ValueError(f"rollout {rollout.rollout} of {rollout.state} is already there")
        offset = self._writer.append(sealed(rollout))
        self._offsets.setdefault(rollout.task_id, array("Q")).append(offset)
        tally.add(rollout)
        self.totals.add(rollout)
        self._unsynced = True
        if time.monotonic() - self._synced_at >= SYNC_EVERY_S:
            self._sync()

    def close(self) -> None:
        """Put everything on disk; may be called twice."""
        self._sync()
        self._writer.close()

    def _sync(self) -> None:
        """Wait until the disk has every line."""
        if self._unsynced:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsynced = False
        self._synced_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def line_number(path: Path, ordinal: int) -> int:
    """Return the line of the record with index ``ordinal`` in a JSONL file that may skip lines."""
    with path.open("rb") as file:
        filled = (number for number, line in enumerate(file, start=1) if line.strip())
        return next(number for index, number in enumerate(filled) if index == ordinal)


def _read(path: Path, completer: str) -> _Contents:
    """Count a ledger; repeated lines are compared with their first occurrence in a second pass."""
    contents = _Contents()
    repeated: dict[tuple[State, int, bool], list[tuple[int, Rollout]]] = {}
    for ordinal, (offset, rollout) in enumerate(read_rollouts(path)):
        if rollout.completer != completer:
            raise InputError(
                f"{path}, line {line_number(path, ordinal)}: a rollout by "
                f"{rollout.completer!r}, this run's policy is {completer!r}: give another folder"
            )
        tally = contents.tallies.setdefault(rollout.state, Tally())
        if tally.has(rollout):
            repeated.setdefault(_key(rollout), []).append((ordinal, rollout))
            contents.duplicates += 1
        else:
            tally.add(rollout)
            contents.totals.add(rollout)
            contents.offsets.setdefault(rollout.task_id, array("Q")).append(offset)
    if repeated:
        _compare(path, repeated)
    return contents


def _key(rollout: Rollout) -> tuple[State, int, bool]:
    """Identify what a line settles."""
    return (rollout.state, rollout.rollout, rollout.settled)


def _compare(
    path: Path, repeated: dict[tuple[State, int, bool], list[tuple[int, Rollout]]]
) -> None:
    """Refuse repetitions that differ from the first line with their key."""
    for first in read_jsonl(path, Rollout):
        for ordinal, rollout in repeated.pop(_key(first), ()):
            if rollout != first:
                raise InputError(
                    f"{path}, line {line_number(path, ordinal)}: rollout {rollout.rollout} of "
                    f"{rollout.state[0]!r} after step {rollout.prefix} is recorded a second time "
                    "with another content: remove the wrong line"
                )
