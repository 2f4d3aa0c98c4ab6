"""The trajectories of a labelling run: an append-only file, read back task by task."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from labeling.ledger import Ledger
from labeling.states import SameState
from labeling.work import TaskWork
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.store import JsonlWriter, read_at, read_offsets


class TrajectoryFile:
    """A file of trajectories and its index by task; in memory are ids and offsets only.

    Every line is on the disk when `append` returns: evidence must never be about a trajectory
    that a power cut took away.

    Parameters
    ----------
    path : Path
        The file; made if missing.

    Raises
    ------
    InputError
        If a line is malformed or repeats an id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = 0
        """Generated in all of them."""
        self._offsets: dict[str, array[int]] = {}
        self._ids: dict[str, int] = {}
        if path.exists():
            for offset, trajectory in read_offsets(path, Trajectory):
                if trajectory.trajectory_id in self._ids:
                    raise InputError(f"{path} holds trajectory {trajectory.trajectory_id!r} twice")
                self._know(trajectory, offset)
        self._writer = JsonlWriter(path, fsync=True)

    def __contains__(self, trajectory_id: object) -> bool:
        return trajectory_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Trajectory]:
        return read_at(self.path, Trajectory, self._ids.values())

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Tasks that have a trajectory, in the order of their first."""
        return tuple(self._offsets)

    def read(self, trajectory_id: str) -> Trajectory:
        """Read one trajectory."""
        return next(read_at(self.path, Trajectory, [self._ids[trajectory_id]]))

    def of_task(self, task_id: str) -> list[Trajectory]:
        """Read the trajectories of one task, in the order of their ids.

        Their order in the file is that in which they ended, and which of them owns a state they
        share must not depend on it.
        """
        found = list(read_at(self.path, Trajectory, self._offsets.get(task_id, ())))
        return sorted(found, key=lambda t: (len(t.trajectory_id), t.trajectory_id))

    def append(self, trajectory: Trajectory) -> None:
        """Write a trajectory.

        Raises
        ------
        ValueError
            If its id is there already.
        OSError
            If the disk is full; the lines before stay.
        """
        if trajectory.trajectory_id in self._ids:
            raise ValueError(f"trajectory {trajectory.trajectory_id!r} is already there")
        self._know(trajectory, self._writer.append(trajectory))

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._writer.close()

    def _know(self, trajectory: Trajectory, offset: int) -> None:
        """Remember where a trajectory lies, and what it cost."""
        self._ids[trajectory.trajectory_id] = offset
        self._offsets.setdefault(trajectory.task.task_id, array("Q")).append(offset)
        self.tokens += trajectory.num_generated_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def measured_tasks(
    trajectories: TrajectoryFile, ledger: Ledger, *, max_steps: int, same: SameState
) -> Iterator[TaskWork]:
    """Yield every task with all its evidence, one at a time.

    Parameters
    ----------
    trajectories : TrajectoryFile
        All trajectories.
    ledger : Ledger
        All rollouts.
    max_steps : int
        Step limit of the continuing agent.
    same : SameState
        What makes two states one.

    Raises
    ------
    InputError
        If a rollout is of a state that no trajectory has.
    """
    for task_id in trajectories.task_ids:
        found = trajectories.of_task(task_id)
        work = TaskWork(found[0].task, found, max_steps=max_steps, same=same)
        for rollout in ledger.rollouts_of(task_id):
            work.count(rollout)
        yield work
