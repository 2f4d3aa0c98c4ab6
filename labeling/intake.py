"""The driver's side of a spread labelling run: what is missing, and what comes in, written once.

Workers may die, and what they were sent is then sent again, from its beginning: so every line that
arrives is looked up by its key first, and only what is missing is written. A rollout is written
only if the recorded trajectory is the one that it continued (`labeling.parcels.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Self

from labeling.config import LabelConfig
from labeling.evidence import open_prefixes
from labeling.ledger import Ledger, Rollout
from labeling.parcels import Order, Parcel, fingerprint, pack_lines, unpack_lines
from labeling.trajectories import TrajectoryFile
from labeling.work import Rounds, TaskWork
from trajectory.errors import InputError
from trajectory.progress import Progress
from trajectory.records import Task, Trajectory
from trajectory.run import RunFolder
from trajectory.store import JsonlWriter, read_jsonl, repair_tail


@dataclass(kw_only=True, slots=True)
class EngineTotals:
    """What the engine of a worker, or of all, did."""

    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    busy_seconds: float = 0.0

    def learn(self, parcel: Parcel) -> None:
        """Take what a parcel of the same worker says; an older one may come after a newer one."""
        for total in fields(self):
            known = getattr(self, total.name)
            setattr(self, total.name, max(known, getattr(parcel, total.name)))


class Intake:
    """The files of a run, as its workers fill them; use as a context manager.

    Parameters
    ----------
    config : LabelConfig
        Settings of the run.
    run : RunFolder
        Where the files are.
    names : sequence of str, length 3
        File names of trajectories, evidence and continuations.

    Raises
    ------
    InputError
        If one of the files is malformed.
    """

    def __init__(self, config: LabelConfig, run: RunFolder, names: Sequence[str]) -> None:
        paths = [run.path / name for name in names]
        self._config, self._run = config, run
        self._evidence, kept = paths[1], paths[2]
        self._files = ExitStack()
        self.trajectories = self._files.enter_context(TrajectoryFile(paths[0]))
        self._ledger: Ledger | None = None
        self._continuations: JsonlWriter | None = None
        if config.keep_continuations:
            repair_tail(kept)
            self._continuations = self._files.enter_context(JsonlWriter(kept))
        self.cut_lines = repair_tail(self._evidence)
        """Unterminated lines of the ledger that were dropped, 0 or 1."""
        self.written = 0
        """Lines written since this was made."""
        self._waiting: dict[str, Trajectory] = {}
        """Continuations whose line in the ledger has not come yet."""
        self._fingerprints: dict[str, str] = {}
        self._engines: dict[str, EngineTotals] = {}
        first = next(read_jsonl(self._evidence, Rollout), None) if self._evidence.exists() else None
        if first is not None:
            self._open_ledger(first.completer)

    @property
    def ledger(self) -> Ledger:
        """The ledger; if nothing tells yet who completes, it is that of the policy as named."""
        return self._ledger or self._open_ledger(self._config.agent.policy)

    @property
    def rollouts(self) -> int:
        """Rollouts that are recorded and need no further attempt."""
        return 0 if self._ledger is None else self._ledger.totals.rollouts

    @property
    def totals(self) -> EngineTotals:
        """What the engines of all workers did, since this was made."""
        engines = self._engines.values()
        return EngineTotals(
            generated_tokens=sum(engine.generated_tokens for engine in engines),
            prompt_tokens=sum(engine.prompt_tokens for engine in engines),
            cached_prompt_tokens=sum(engine.cached_prompt_tokens for engine in engines),
            busy_seconds=sum(engine.busy_seconds for engine in engines),
        )

    def expected(self, tasks: Iterable[Task]) -> int:
        """Return the rollouts to expect by what is known: those of prompts and recorded states."""
        task_ids = {task.task_id for task in tasks} | set(self.trajectories.task_ids)
        states = len(task_ids) + sum(self._states(t) for t in self.trajectories)
        return states * self._config.rollouts

    def missing(self, tasks: Sequence[Task]) -> Iterator[Order]:
        """Yield what is left to do, task by task.

        Parameters
        ----------
        tasks : sequence of Task
            Tasks to sample trajectories for; none if all trajectories are given.
        """
        for task in tasks:
            known = self.trajectories.of_task(task.task_id)
            if len(known) < self._config.samples or self._wants_more(task, known):
                yield self._order(task, known, sample=True)
        if not tasks:
            for task_id in self.trajectories.task_ids:
                known = self.trajectories.of_task(task_id)
                if self._wants_more(known[0].task, known):
                    yield self._order(known[0].task, known, sample=False)

    def take(self, parcel: Parcel, bar: Progress) -> None:
        """Write what a parcel brings that is not there yet.

        Raises
        ------
        InputError
            If the worker gave up, or its policy is not the one that the ledger is by.
        RuntimeError
            If the worker gave up for a fault of the program; the message has its traceback.
        """
        if parcel.completer:
            self._check_completer(parcel)
            self._run.stamp(parcel.isolation)
            self._engines.setdefault(parcel.worker, EngineTotals()).learn(parcel)
        for trajectory in unpack_lines(Trajectory, parcel.trajectories):
            self._take_trajectory(trajectory, bar)
        if self._continuations is not None:
            for trajectory in unpack_lines(Trajectory, parcel.continuations):
                self._waiting[trajectory.trajectory_id] = trajectory
        for rollout in unpack_lines(Rollout, parcel.rollouts):
            self._take_rollout(rollout, parcel, bar)
        if parcel.traceback:
            raise RuntimeError(f"the worker {parcel.worker} failed:\n{parcel.traceback}")
        if parcel.failure is not None:
            raise InputError(f"worker {parcel.worker}: {parcel.failure}")

    def close(self) -> None:
        """Put everything on disk; may be called twice."""
        self._files.close()

    def _take_trajectory(self, trajectory: Trajectory, bar: Progress) -> None:
        """Write a trajectory, if its id is new."""
        if trajectory.trajectory_id in self.trajectories:
            return
        self.trajectories.append(trajectory)
        self.written += 1
        bar.grow(self._states(trajectory) * self._config.rollouts)

    def _take_rollout(self, rollout: Rollout, parcel: Parcel, bar: Progress) -> None:
        """Write a rollout, if its key is new and it continues what is recorded."""
        continuation = self._waiting.pop(_continuation_id(rollout), None)
        ledger, origin = self.ledger, rollout.trajectory_id
        if ledger.tally(rollout.state).has(rollout):
            return
        if origin is not None and parcel.origins[origin] != self._fingerprint(origin):
            return
        if self._continuations is not None and continuation is not None:
            self._continuations.append(continuation)
        ledger.append(rollout)
        self.written += 1
        if rollout.settled:
            bar.advance(tokens=ledger.totals.tokens)

    def _fingerprint(self, trajectory_id: str) -> str | None:
        """Return the fingerprint of a recorded trajectory; None if there is none of this id."""
        if trajectory_id not in self.trajectories:
            return None
        if trajectory_id not in self._fingerprints:
            recorded = self.trajectories.read(trajectory_id)
            self._fingerprints[trajectory_id] = fingerprint(recorded)
        return self._fingerprints[trajectory_id]

    def _states(self, trajectory: Trajectory) -> int:
        """Count the states of a trajectory, its task's prompt aside, that can be continued."""
        return len(open_prefixes(trajectory, self._config.agent.max_steps))

    def _wants_more(self, task: Task, known: Sequence[Trajectory]) -> bool:
        """Tell whether a task whose trajectories are all there lacks rollouts."""
        work = TaskWork(
            task, known, max_steps=self._config.agent.max_steps, same=self._config.same_state
        )
        rounds = Rounds(
            work,
            self._config.strategy,
            self._recorded(task),
            exclude_truncated=self._config.truncated == "exclude",
        )
        return bool(rounds.next_round())

    def _order(self, task: Task, known: Sequence[Trajectory], *, sample: bool) -> Order:
        """Make the order for a task."""
        return Order(
            task=task,
            sample=sample,
            trajectories=pack_lines(known),
            rollouts=pack_lines(self._recorded(task)),
            completer="" if self._ledger is None else self._ledger.completer,
        )

    def _recorded(self, task: Task) -> Iterator[Rollout]:
        """Read the rollouts of a task."""
        return iter(()) if self._ledger is None else self._ledger.rollouts_of(task.task_id)

    def _check_completer(self, parcel: Parcel) -> None:
        """Have the ledger be by the first policy that works on it, and by no other."""
        if self._ledger is None:
            self._open_ledger(parcel.completer)
        elif parcel.completer != self._ledger.completer:
            raise InputError(
                f"worker {parcel.worker} has the policy {parcel.completer!r}, the rollouts so far "
                f"are by {self._ledger.completer!r}: give all nodes the same policy, or another "
                "folder for the output"
            )

    def _open_ledger(self, completer: str) -> Ledger:
        """Open the ledger, now that it is known who completes."""
        self._ledger = self._files.enter_context(Ledger(self._evidence, completer=completer))
        return self._ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _continuation_id(rollout: Rollout) -> str:
    """Return the id under which a rollout is kept as a trajectory."""
    owner, prefix = rollout.state
    return f"{owner}@{prefix}/{rollout.rollout}.{rollout.attempt}"
