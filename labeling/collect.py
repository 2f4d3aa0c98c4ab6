"""Monte-Carlo collection: samples trajectories and continues each from every prefix.

Everything is one stream of episodes with no barrier in it. A trajectory's continuations join the
queue the moment it ends, ahead of further sampling, so the engine stays full and the continuations
of one trajectory run side by side (their common prefix is cached once). Only the trajectories
being continued are in memory.

Which states are run:

- Prefix 0 is the task's prompt, the same for all trajectories of a task: it is measured once per
  task, while its trajectories are being sampled, and shared.
- Prefix S of a trajectory is its own continuation, counted at no cost: see `labeling.evidence`.
- A trajectory that broken infrastructure ended is kept but not continued.

A rollout that broken infrastructure ended is repeated once. Such ends are written only when what
broke is seen working again (`labeling.failures`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

from agent.episode import Agent, EpisodeSpec, Prefix, run_episodes
from labeling.evidence import open_prefixes
from labeling.failures import FailureWatch
from labeling.jobs import Job, JobQueue
from labeling.ledger import ATTEMPTS, Ledger, Rollout
from trajectory.errors import InputError
from trajectory.progress import Progress
from trajectory.records import Task, Trajectory
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter, read_jsonl


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to collect."""

    rollouts: int
    """K, continuations per state, >= 1."""
    samples: int = 1
    """Trajectories sampled per task, >= 1."""
    seed: int = 0


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
        self._queue = JobQueue()
        self._tasks_planned: set[str] = set()
        self._tasks_begun: set[str] = set()
        self._sampled: set[str] = set()
        self.planned = 0
        """Rollouts that the trajectories known so far need, those done before included."""
        self._ended_well = 0

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
        self.planned += sum(self._count_prompt(task) for task in tasks)
        there = self._continue_all(path, len(self._sampled))
        self._queue.fill(chain(there, self._sample(tasks)))

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
        watch = FailureWatch(concurrency)
        async with aclosing(episodes):
            async for ended in episodes:
                job = self._queue.take(ended.trajectory_id)
                if ended.stop.failed:
                    self._repeat(job)
                self._ended_well += not ended.stop.failed
                self._record(watch.see(job, ended), bar)
                self._stop_if(watch.verdict())
        worked = self._ended_well > 0 or self._ledger.totals.rollouts > self._ledger.totals.failed
        self._stop_if(watch.last_verdict(ever_worked=worked))
        self._record(watch.rest(), bar)

    def _count(self, trajectory: Trajectory) -> int:
        """Return the rollouts that a further trajectory adds to the plan."""
        if trajectory.stop.failed:
            return 0
        states = len(open_prefixes(trajectory, self._agent.limits.max_steps))
        return states * self._plan.rollouts + self._count_prompt(trajectory.task)

    def _count_prompt(self, task: Task) -> int:
        """Return the rollouts that the shared prefix of a task adds to the plan."""
        new = task.task_id not in self._tasks_planned
        self._tasks_planned.add(task.task_id)
        return self._plan.rollouts if new else 0

    def _continue_all(self, path: Path, count: int) -> Iterator[Job]:
        """Yield the missing continuations of the first ``count`` trajectories of the file."""
        for _, trajectory in zip(range(count), read_jsonl(path, Trajectory), strict=False):
            yield from self._continue(trajectory)

    def _continue(self, trajectory: Trajectory) -> Iterator[Job]:
        """Yield the missing continuations of one trajectory, short prefixes first."""
        if trajectory.stop.failed:
            return
        yield from self._continue_prompt(trajectory.task)
        for steps in open_prefixes(trajectory, self._agent.limits.max_steps):
            start = Prefix(trajectory=trajectory, steps=steps)
            yield from self._continuations(trajectory.task, start)

    def _continue_prompt(self, task: Task) -> Iterator[Job]:
        """Yield the missing continuations of prefix 0 of a task, once."""
        if task.task_id not in self._tasks_begun:
            self._tasks_begun.add(task.task_id)
            yield from self._continuations(task, None)

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
        """Yield the missing trajectories of each task, then the rollouts of its prompt."""
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
            yield from self._continue_prompt(task)

    def _repeat(self, job: Job) -> None:
        """Queue a failed rollout once more."""
        if job.rollout is not None and job.attempt + 1 < ATTEMPTS:
            task, start = job.spec.task, job.spec.start
            self._queue.repeat(
                self._continuation(task, start, job.rollout, attempt=job.attempt + 1)
            )

    def _record(self, ends: Iterable[tuple[Job, Trajectory]], bar: Progress) -> None:
        """Write ends, and queue what follows from them."""
        for job, ended in ends:
            if job.rollout is None:
                self._trajectories.append(ended)
                more = self._count(ended)
                self.planned += more
                bar.grow(more)
                self._queue.follow(self._continue(ended))
                continue
            rollout = _rollout(job, job.rollout, ended, completer=self._ledger.completer)
            self._ledger.append(rollout)
            if rollout.settled:
                bar.advance(tokens=self._ledger.totals.tokens)

    @staticmethod
    def _stop_if(verdict: str | None) -> None:
        """End the run with a sentence, if there is one."""
        if verdict is not None:
            raise InputError(verdict)


def _rollout(job: Job, index: int, ended: Trajectory, *, completer: str) -> Rollout:
    """Reduce a continuation to its line in the ledger."""
    owner, prefix = job.state
    written = ended.steps[prefix:]
    failure = ended.meta.get("failure")
    return Rollout(
        task_id=job.spec.task.task_id,
        trajectory_id=owner if prefix else None,
        prefix=prefix,
        rollout=index,
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
