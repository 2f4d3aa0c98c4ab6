"""One episode of a labelling run as a unit of work, and the queue of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from agent.episode import EpisodeSpec
from labeling.ledger import State


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One episode to run, and what its end will count for."""

    spec: EpisodeSpec
    rollout: int | None = None
    """Index among the continuations of its state; None for a trajectory to be labelled."""
    attempt: int = 0

    @property
    def state(self) -> State:
        """The state it starts from."""
        start = self.spec.start
        if start is None:
            return (self.spec.task.task_id, 0)
        return (start.trajectory.trajectory_id, start.steps)


class JobQueue:
    """What to run next, as an iterator of episodes.

    It may run dry while episodes are alive and be asked again after one has ended and brought
    new work, so unlike other iterators it can go on after ``StopIteration``.

    Parameters
    ----------
    has_budget : callable, optional
        Asked before every episode; once it says no, nothing more is begun.
    """

    def __init__(self, has_budget: Callable[[], bool] = lambda: True) -> None:
        self._has_budget = has_budget
        self._urgent: deque[Iterator[Job]] = deque()
        self._rest: Iterator[Job] = iter(())
        self._alive: dict[str, Job] = {}

    def fill(self, jobs: Iterator[Job]) -> None:
        """Set what is run when nothing is urgent."""
        self._rest = jobs

    def follow(self, jobs: Iterator[Job]) -> None:
        """Add work that goes before the rest, after other such work."""
        self._urgent.append(jobs)

    def repeat(self, job: Job) -> None:
        """Add a job that goes before all others."""
        self._urgent.appendleft(iter([job]))

    def take(self, trajectory_id: str) -> Job:
        """Return the job whose episode has ended."""
        return self._alive.pop(trajectory_id)

    def __iter__(self) -> Self:
        return self

    @property
    def num_alive(self) -> int:
        """Episodes begun and not taken back."""
        return len(self._alive)

    @property
    def has_followers(self) -> bool:
        """Whether work that followed from an end is waiting."""
        return bool(self._urgent)

    def __next__(self) -> EpisodeSpec:
        if not self._has_budget():
            raise StopIteration
        job = self._next()
        self._alive[job.spec.trajectory_id] = job
        return job.spec

    def _next(self) -> Job:
        """Return the next job."""
        while self._urgent:
            job = next(self._urgent[0], None)
            if job is not None:
                return job
            self._urgent.popleft()
        return next(self._rest)
