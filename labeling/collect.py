"""Monte-Carlo collection: samples trajectories and continues each from every prefix.

Everything is one stream of episodes with no barrier in it. A trajectory's continuations join the
queue the moment it ends, ahead of further sampling, so the engine stays full and the continuations
of one trajectory run side by side (their common prefix is cached once). Only the trajectories
being continued are in memory.

Which states are run:

- Prefix 0 is the task's prompt, the same for all trajectories of a task: it is measured once per
  task and shared.
- Prefix S of a trajectory is its own continuation, counted at no cost: see `labeling.evidence`.
- A trajectory that broken infrastructure ended is kept but not continued.

A rollout that broken infrastructure ended is repeated once. Such ends are written only when
something works again: if the engine has died, they are dropped and the resumed run repeats them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self, cast

from agent.episode import Agent, EpisodeSpec, Prefix, run_episodes
from labeling.evidence import open_prefixes
from labeling.ledger import ATTEMPTS, Ledger, Rollout, State
from trajectory.errors import InputError
from trajectory.progress import Progress
from trajectory.records import StopReason, Task, Trajectory
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter, read_jsonl

_FEWEST_FAILURES = 16
"""Failures in a row below which an engine is not taken for dead while work is left."""
_SUSPECT_OWNERS = 8
"""Different tasks or trajectories a broken tool must hit before it is taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to collect."""

    rollouts: int
    """K, continuations per state, >= 1."""
    samples: int = 1
    """Trajectories sampled per task, >= 1."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One episode to run, and what its end will count for."""

    spec: EpisodeSpec
    rollout: int | None = None
    """Index among the continuations of its state; None for a trajectory to be labelled."""
    attempt: int = 0

    @property
    def state(self) -> State:
        """The state a continuation starts from."""
        start = self.spec.start
        return (start.trajectory.trajectory_id, start.steps) if start else (self.task_id, 0)

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self.spec.task.task_id


class Collector:
    """Runs a plan to its end, writing every result as it comes.

    Parameters
    ----------
    agent : Agent
        Samples the trajectories and continues them.
    plan : Plan
        What to collect.
    ledger : Ledger
        Holds what was done before, and takes what is done now.
    trajectories : JsonlWriter
        Takes the trajectories that are sampled.
    """

    def __init__(
        self, agent: Agent, plan: Plan, *, ledger: Ledger, trajectories: JsonlWriter
    ) -> None:
        self._agent = agent
        self._plan = plan
        self._ledger = ledger
        self._trajectories = trajectories
        self._queue = _Queue()
        self._tasks_planned: set[str] = set()
        self._tasks_begun: set[str] = set()
        self._sampled: set[str] = set()
        self._held: list[tuple[Job, Trajectory]] = []
        self.planned = 0
        """Rollouts that the trajectories known so far need, those done before included."""
        self._ended = 0
        """Episodes that ended in this run without a failure."""

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Plan the rest of the work: continue what is there, then sample what is missing.

        Parameters
        ----------
        tasks : sequence of Task
            Tasks to sample trajectories for; none if all trajectories are given.

        Raises
        ------
        InputError
            If a line of the trajectory file is malformed or repeats an id.
        """
        path = self._trajectories.path
        for trajectory in read_jsonl(path, Trajectory):
            if trajectory.trajectory_id in self._sampled:
                raise InputError(f"{path} holds trajectory {trajectory.trajectory_id!r} twice")
            self._sampled.add(trajectory.trajectory_id)
            self.planned += self._count(trajectory)
        self._queue.rest = chain(self._continue_all(path, len(self._sampled)), self._sample(tasks))

    async def run(self, *, concurrency: int, bar: Progress) -> None:
        """Run everything that is left, at most ``concurrency`` episodes at a time.

        Raises
        ------
        InputError
            If engine or tools have stopped working; what ended before is written.
        """
        episodes = cast(
            "AsyncGenerator[Trajectory, None]",
            run_episodes(self._agent, self._queue, concurrency=concurrency),
        )
        most_failures = max(_FEWEST_FAILURES, 2 * concurrency)
        async with aclosing(episodes):
            async for ended in episodes:
                job = self._queue.take(ended.trajectory_id)
                if ended.stop.failed:
                    self._hold(job, ended)
                    if len(self._held) >= most_failures and self._hopeless():
                        raise InputError(self._obituary())
                else:
                    self._ended += 1
                    self._release(bar)
                    self._record(job, ended, bar)
        if self._held and (self._all_engine() or self._nothing_ever_worked()):
            raise InputError(self._obituary())
        self._release(bar)

    def _count(self, trajectory: Trajectory) -> int:
        """Return the rollouts that a further trajectory adds to the plan."""
        if trajectory.stop.failed:
            return 0
        states = len(open_prefixes(trajectory, self._agent.limits.max_steps))
        states += trajectory.task.task_id not in self._tasks_planned
        self._tasks_planned.add(trajectory.task.task_id)
        return states * self._plan.rollouts

    def _continue_all(self, path: Path, count: int) -> Iterator[Job]:
        """Yield the missing continuations of the first ``count`` trajectories of the file."""
        for _, trajectory in zip(range(count), read_jsonl(path, Trajectory), strict=False):
            yield from self._continue(trajectory)

    def _continue(self, trajectory: Trajectory) -> Iterator[Job]:
        """Yield the missing continuations of one trajectory, short prefixes first."""
        task = trajectory.task
        if trajectory.stop.failed:
            return
        if task.task_id not in self._tasks_begun:
            self._tasks_begun.add(task.task_id)
            yield from self._continuations(task, None)
        for steps in open_prefixes(trajectory, self._agent.limits.max_steps):
            yield from self._continuations(task, Prefix(trajectory=trajectory, steps=steps))

    def _continuations(self, task: Task, start: Prefix | None) -> Iterator[Job]:
        """Yield the missing continuations of one state."""
        state = (start.trajectory.trajectory_id, start.steps) if start else (task.task_id, 0)
        for rollout, attempt in self._ledger.tally(state).missing(self._plan.rollouts):
            yield self._continuation(task, start, rollout, attempt=attempt)

    def _continuation(self, task: Task, start: Prefix | None, rollout: int, *, attempt: int) -> Job:
        """Make one continuation; its seed depends on nothing but its key."""
        owner = start.trajectory.trajectory_id if start else task.task_id
        steps = start.steps if start else 0
        group = f"{owner}@{steps}"
        spec = EpisodeSpec(
            trajectory_id=f"{group}/{rollout}.{attempt}",
            task=task,
            seed=derive_seed("rollout", self._plan.seed, owner, steps, rollout, attempt),
            group=group,
            start=start,
        )
        return Job(spec=spec, rollout=rollout, attempt=attempt)

    def _sample(self, tasks: Sequence[Task]) -> Iterator[Job]:
        """Yield the trajectories that are still to be sampled."""
        for task in tasks:
            for sample in range(self._plan.samples):
                trajectory_id = f"{task.task_id}/{sample}"
                if trajectory_id not in self._sampled:
                    seed = derive_seed("trajectory", self._plan.seed, task.task_id, sample)
                    yield Job(
                        spec=EpisodeSpec(
                            trajectory_id=trajectory_id, task=task, seed=seed, group=task.task_id
                        )
                    )

    def _record(self, job: Job, ended: Trajectory, bar: Progress) -> None:
        """Write one end, and queue what follows from it."""
        if job.rollout is None:
            self._trajectories.append(ended)
            more = self._count(ended)
            self.planned += more
            bar.grow(more)
            self._queue.urgent.append(self._continue(ended))
            return
        rollout = _rollout(job, ended, self._ledger.completer)
        self._ledger.append(rollout)
        if rollout.settled:
            bar.advance(tokens=self._ledger.totals.tokens)

    def _hold(self, job: Job, ended: Trajectory) -> None:
        """Keep a failed end back until something works again, and queue its repetition."""
        self._held.append((job, ended))
        if job.rollout is not None and job.attempt + 1 < ATTEMPTS:
            again = self._continuation(
                job.spec.task, job.spec.start, job.rollout, attempt=job.attempt + 1
            )
            self._queue.urgent.appendleft(iter([again]))

    def _release(self, bar: Progress) -> None:
        """Write the failed ends that were held back."""
        held, self._held = self._held, []
        for job, ended in held:
            self._record(job, ended, bar)

    def _all_engine(self) -> bool:
        """Tell whether the engine is behind every failure held back."""
        return all(ended.stop is StopReason.ENGINE_FAILURE for _, ended in self._held)

    def _hopeless(self) -> bool:
        """Tell whether the failures held back mean that engine or tools are dead."""
        owners = {job.state[0] for job, _ in self._held}
        return self._all_engine() or len(owners) >= _SUSPECT_OWNERS

    def _nothing_ever_worked(self) -> bool:
        """Tell whether this run, earlier starts included, has only failures."""
        totals = self._ledger.totals
        return self._ended == 0 and totals.rollouts == totals.failed

    def _obituary(self) -> str:
        """Say what stopped the run."""
        what = "the engine" if self._all_engine() else "a tool"
        cause = str(self._held[-1][1].meta.get("failure", "no cause given"))
        return (
            f"{what} stopped working: the last {len(self._held)} episodes failed ({cause}); what "
            "ended before is saved: repair it and run the same command again to resume"
        )


class _Queue:
    """What to run next. It may run dry while episodes are alive, and be asked again later."""

    def __init__(self) -> None:
        self.urgent: deque[Iterator[Job]] = deque()
        """Repetitions, and continuations of trajectories sampled in this run."""
        self.rest: Iterator[Job] = iter(())
        self._alive: dict[str, Job] = {}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EpisodeSpec:
        while self.urgent:
            job = next(self.urgent[0], None)
            if job is not None:
                return self._start(job)
            self.urgent.popleft()
        return self._start(next(self.rest))

    def _start(self, job: Job) -> EpisodeSpec:
        self._alive[job.spec.trajectory_id] = job
        return job.spec

    def take(self, trajectory_id: str) -> Job:
        """Return the job whose episode has ended."""
        return self._alive.pop(trajectory_id)


def _rollout(job: Job, ended: Trajectory, completer: str) -> Rollout:
    """Reduce a continuation to its line in the ledger."""
    assert job.rollout is not None
    owner, prefix = job.state
    written = ended.steps[prefix:]
    failure = ended.meta.get("failure")
    return Rollout(
        task_id=job.task_id,
        trajectory_id=owner if prefix else None,
        prefix=prefix,
        rollout=job.rollout,
        completer=completer,
        attempt=job.attempt,
        stop=ended.stop,
        outcome=ended.outcome,
        answer=ended.answer,
        tokens=sum(len(step.token_ids or ()) for step in written),
        tool_calls=sum(len(step.calls) for step in written),
        seed=job.spec.seed,
        failure=None if failure is None else str(failure),
    )
