"""The two sides of training: tasks to learn from, and tasks held out to stop and calibrate by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.model_selection import GroupShuffleSplit

from prm.checkpoint import TaskSplit
from prm.data import Example
from trajectory.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Examples on both sides of the split by task, and what was left out."""

    train: list[Example]
    held_out: list[Example]
    dropped_long: int
    """Trajectories longer than the limit."""
    dropped_unlabelled: int
    """Trajectories without a single usable target."""

    def tasks(self) -> TaskSplit:
        """Name the tasks on both sides."""
        return TaskSplit(
            train=tuple(sorted({e.task_id for e in self.train})),
            validation=tuple(sorted({e.task_id for e in self.held_out})),
        )


def split_by_task(
    examples: Sequence[Example], *, share: float, seed: int, source: str
) -> tuple[list[Example], list[Example]]:
    """Split examples so that no task is on both sides.

    Parameters
    ----------
    examples : sequence of Example
        Of any number of tasks.
    share : float
        Of the tasks to hold out, in (0, 1); at least one is held out and at least one stays.
    seed : int
        Decides which.
    source : str
        Where they come from, for the message.

    Returns
    -------
    train, held_out : list of Example

    Raises
    ------
    InputError
        If there are fewer than two tasks.
    """
    tasks = [e.task_id for e in examples]
    num_tasks = len(set(tasks))
    if num_tasks < 2:
        raise InputError(f"{source} holds one task only: a PRM needs at least 2, to hold one out")
    held_out = min(num_tasks - 1, max(1, round(share * num_tasks)))
    splitter = GroupShuffleSplit(n_splits=1, test_size=held_out, random_state=seed)
    indices = next(splitter.split(tasks, groups=tasks))
    train_side, held_out_side = ([examples[i] for i in side] for side in indices)
    return train_side, held_out_side
