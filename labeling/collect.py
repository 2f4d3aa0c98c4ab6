"""Monte-Carlo collection: samples trajectories and continues each from its states.

Everything is one stream of episodes. The unit of decision is the task: once its trajectories are
sampled, a strategy asks for rollouts of their states in rounds (`labeling.work`). A round waits
for its own rollouts only, hundreds of tasks are in flight, and follow-up work goes ahead of
further sampling; so the engine stays full, the continuations of one trajectory run side by side
(their common prefix is cached once), and only the tasks being measured are in memory.

A trajectory that broken infrastructure ended is kept but not continued. A rollout that it ended is
repeated once. Such ends are written only when what broke is seen working again
(`labeling.failures`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from agent.episode import Agent, EpisodeSpec, Prefix, run_episodes
from labeling.branches import Branches
from labeling.evidence import open_prefixes
from labeling.failures import FailureWatch
from labeling.jobs import Job, JobQueue
from labeling.ledger import ATTEMPTS, Ledger, Rollout, State
from labeling.states import SameState, state_digests
from labeling.strategies import Strategy
from labeling.trajectories import TrajectoryFile
from labeling.work import Rounds, TaskWork
from trajectory.errors import InputError
from trajectory.progress import Progress
from trajectory.records import Task, Trajectory
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to collect."""

    strategy: Strategy
    """Which states get how many rollouts."""
    rollouts: int
    """What the progress bar expects per state."""
    samples: int = 1
    """Trajectories sampled per task, >= 1."""
    seed: int = 0
    same_state: SameState = "text"
    """When rollouts count for later states they come through."""
    exclude_truncated: bool = False
    """Whether cut-off rollouts are left out of what the strategy sees."""
    max_tokens: int | None = None
    """Tokens of all trajectories and rollouts after which nothing more is begun; None: no end."""


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
    trajectories : TrajectoryFile
        Those that are there, and takes those that are sampled.
    continuations : JsonlWriter, optional
        Takes the rollouts as trajectories.
    """

    def __init__(
        self,
        agent: Agent,
        plan: Plan,
        *,
        ledger: Ledger,
        trajectories: TrajectoryFile,
        continuations: JsonlWriter | None = None,
    ) -> None:
        self._agent = agent
        self._plan = plan
        self._ledger = ledger
        self._trajectories = trajectories
        self._continuations = continuations
        self._branches = Branches(agent)
        self._queue = JobQueue(has_budget=self.has_budget)
        self._unsampled: dict[str, int] = {}
        """Trajectories that a task with some still to come waits for."""
        self._active: dict[str, Rounds] = {}
        self._expected: dict[str, int] = {}
        """Rollouts expected per task known so far."""
        self._bar: Progress | None = None
        self._ended_well = 0

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Plan the rest of the work.

        Parameters
        ----------
        tasks : sequence of Task
            Tasks to sample trajectories for; none if all trajectories are given.
        """
        for trajectory in self._trajectories:
            task_id = trajectory.task.task_id
            states = len(open_prefixes(trajectory, self._agent.limits.max_steps))
            before = self._expected.setdefault(task_id, self._plan.rollouts)
            self._expected[task_id] = before + states * self._plan.rollouts
        for task in tasks:
            self._expected.setdefault(task.task_id, self._plan.rollouts)
        self._queue.fill(self._sample(tasks) if tasks else self._measure())

    @property
    def planned(self) -> int:
        """Rollouts expected for the tasks known so far, those done before included."""
        return sum(self._expected.values())

    def has_budget(self) -> bool:
        """Tell whether further episodes may begin.

        What is in flight is counted at the mean of what has ended, so the budget is met to within
        the spread of the episodes in flight.
        """
        limit = self._plan.max_tokens
        if limit is None:
            return True
        spent = self._ledger.totals.tokens + self._trajectories.tokens
        ended = self._ledger.totals.rollouts + len(self._trajectories)
        return spent + self._queue.num_alive * spent / max(1, ended) < limit

    async def run(self, *, concurrency: int, bar: Progress) -> None:
        """Run everything that is left, at most ``concurrency`` episodes at a time.

        Raises
        ------
        InputError
            If engine or tools have stopped working; what ended before is written.
        """
        self._bar = bar
        watch = FailureWatch(concurrency)
        try:
            # Failures held back to the end may be what a round was waiting for.
            while await self._run_queued(watch, concurrency=concurrency, bar=bar):
                pass
        finally:
            await self._branches.close()

    async def _run_queued(self, watch: FailureWatch, *, concurrency: int, bar: Progress) -> bool:
        """Run what is queued and what follows from it; return whether there is more now."""
        episodes = cast(
            "AsyncGenerator[Trajectory, None]",
            run_episodes(self._agent, self._queue, concurrency=concurrency),
        )
        async with aclosing(episodes):
            async for ended in episodes:
                job = self._queue.take(ended.trajectory_id)
                if ended.stop.failed:
                    self._repeat(job)
                self._ended_well += not ended.stop.failed
                await self._record(watch.see(job, ended), bar)
                self._stop_if(watch.verdict())
        worked = self._ended_well > 0 or self._ledger.totals.rollouts > self._ledger.totals.failed
        self._stop_if(watch.last_verdict(ever_worked=worked))
        await self._record(watch.rest(), bar)
        return self._queue.has_followers and self.has_budget()

    # -- from tasks to jobs ------------------------------------------------------------------

    def _sample(self, tasks: Sequence[Task]) -> Iterator[Job]:
        """Yield the missing trajectories of each task; measure it if none is missing."""
        for task in tasks:
            missing = []
            for sample in range(self._plan.samples):
                trajectory_id = f"{task.task_id}/{sample}"
                if trajectory_id not in self._trajectories:
                    missing.append((trajectory_id, sample))
            if not missing:
                yield from self._begin(task)
                continue
            self._unsampled[task.task_id] = len(missing)
            for trajectory_id, sample in missing:
                seed = derive_seed("trajectory", self._plan.seed, task.task_id, sample)
                yield Job(
                    spec=EpisodeSpec(
                        trajectory_id=trajectory_id, task=task, seed=seed, group=task.task_id
                    )
                )

    def _measure(self) -> Iterator[Job]:
        """Yield the rollouts of tasks whose trajectories are all there."""
        for task_id in self._trajectories.task_ids:
            yield from self._begin(self._trajectories.of_task(task_id)[0].task)

    def _begin(self, task: Task) -> Iterator[Job]:
        """Yield the first rollouts of a task whose trajectories are all there."""
        task_id = task.task_id
        work = TaskWork(
            task,
            self._trajectories.of_task(task_id),
            max_steps=self._agent.limits.max_steps,
            same=self._plan.same_state,
        )
        rounds = Rounds(
            work,
            self._plan.strategy,
            self._ledger.rollouts_of(task_id),
            exclude_truncated=self._plan.exclude_truncated,
        )
        self._active[task_id] = rounds
        self._expect(task_id, self._plan.rollouts * len(work.nodes))
        yield from self._round(rounds)

    def _round(self, rounds: Rounds) -> Iterator[Job]:
        """Yield the next round of a task; close the task if there is none."""
        task = rounds.work.task
        missing = rounds.next_round()
        for node, index, attempt in missing:
            yield self._continuation(task, node.state, node.start, index, attempt=attempt)
        if not missing:
            del self._active[task.task_id]
            self._branches.drop(task.task_id)
            self._expect(task.task_id, sum(node.own.rollouts for node in rounds.work.nodes))

    def _continuation(
        self, task: Task, state: State, start: Prefix | None, rollout: int, *, attempt: int
    ) -> Job:
        """Make one continuation; its seed depends on nothing but its key."""
        owner, steps = state
        group = f"{owner}@{steps}"
        spec = EpisodeSpec(
            trajectory_id=f"{group}/{rollout}.{attempt}",
            task=task,
            seed=derive_seed("rollout", self._plan.seed, owner, steps, rollout, attempt),
            group=group,
            start=start,
            restored=None if start is None else self._branches.of(start),
        )
        return Job(spec=spec, rollout=rollout, attempt=attempt)

    def _repeat(self, job: Job) -> None:
        """Queue a failed rollout once more."""
        if job.rollout is not None and job.attempt + 1 < ATTEMPTS:
            self._queue.repeat(
                self._continuation(
                    job.spec.task,
                    job.state,
                    job.spec.start,
                    job.rollout,
                    attempt=job.attempt + 1,
                )
            )

    # -- from ends to records ----------------------------------------------------------------

    async def _record(self, ends: Iterable[tuple[Job, Trajectory]], bar: Progress) -> None:
        """Write ends, and queue what follows from them."""
        for job, ended in ends:
            if job.rollout is None:
                self._record_trajectory(ended)
            else:
                self._record_rollout(job, job.rollout, ended, bar)
        await self._branches.close_dropped()

    def _record_trajectory(self, ended: Trajectory) -> None:
        """Write a sampled trajectory; the last one of its task starts the rollouts."""
        self._trajectories.append(ended)
        task_id = ended.task.task_id
        self._unsampled[task_id] -= 1
        if self._unsampled[task_id]:
            return
        del self._unsampled[task_id]
        self._follow(self._begin(ended.task))

    def _record_rollout(self, job: Job, index: int, ended: Trajectory, bar: Progress) -> None:
        """Write a rollout; the last one of its round asks for the next."""
        if self._continuations is not None:
            self._continuations.append(ended)
        rollout = _rollout(
            job, index, ended, completer=self._ledger.completer, same=self._plan.same_state
        )
        self._ledger.append(rollout)
        if rollout.settled:
            bar.advance(tokens=self._ledger.totals.tokens)
        # A failure that was held back may come after the task is done.
        rounds = self._active.get(job.spec.task.task_id)
        if rounds is not None and rounds.ended(rollout):
            self._follow(self._round(rounds))

    def _follow(self, jobs: Iterator[Job]) -> None:
        """Queue jobs ahead of the rest; what the iterator decides, it decides now."""
        self._queue.follow(iter(list(jobs)))

    def _expect(self, task_id: str, rollouts: int) -> None:
        """Correct what the progress bar expects of a task."""
        if self._bar is not None:
            self._bar.grow(rollouts - self._expected.get(task_id, 0))
        self._expected[task_id] = rollouts

    @staticmethod
    def _stop_if(verdict: str | None) -> None:
        """End the run with a sentence, if there is one."""
        if verdict is not None:
            raise InputError(verdict)


def _rollout(
    job: Job, index: int, ended: Trajectory, *, completer: str, same: SameState
) -> Rollout:
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
        mismatch=bool(ended.meta.get("replay_mismatch")),
        reached=state_digests(job.spec.task.task_id, ended.steps, same)[prefix:-1],
    )
