"""A large pool of real rollouts, from which labelling runs of any strategy are drawn again.

Rollouts of one state are independent, so drawing them without replacement from a pool is what
running the strategy would have given. The strategy, the counting and the sharing of states are the
product's own code; only the engine is replaced by the pool.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from labeling.ledger import Ledger, Rollout, State
from labeling.states import SameState
from labeling.strategies import Strategy
from labeling.trajectories import TrajectoryFile
from labeling.work import Rounds, TaskWork
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.seeds import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """The value of one state, measured with rollouts that no simulated run is given."""

    n: int
    c: int

    @property
    def value(self) -> float:
        """Share of right ones."""
        return self.c / self.n

    @property
    def variance(self) -> float:
        """Sampling variance of ``value``."""
        return self.value * (1 - self.value) / self.n


@dataclass(frozen=True, kw_only=True)
class TaskPool:
    """Trajectories of one task, and the rollouts of their states."""

    trajectories: tuple[Trajectory, ...]
    rollouts: dict[State, list[Rollout]]
    """At least ``drawable`` of each state, for simulated runs."""
    truth: dict[State, Truth]
    max_steps: int

    def tokens(self, state: State) -> float:
        """Return the mean cost of a rollout of a state, tokens."""
        rollouts = self.rollouts[state]
        return sum(rollout.tokens for rollout in rollouts) / len(rollouts)

    def simulate(self, strategy: Strategy, *, same: SameState, seed: int) -> TaskWork:
        """Run a strategy on rollouts drawn from the pool.

        Raises
        ------
        InputError
            If it wants more of a state than the pool has.
        """
        task = self.trajectories[0].task
        work = TaskWork(task, self.trajectories, max_steps=self.max_steps, same=same)
        rng = Random(derive_seed("pool", seed, task.task_id))  # noqa: S311
        drawn = []
        for node in work.nodes:
            order = rng.sample(self.rollouts[node.state], len(self.rollouts[node.state]))
            drawn += [replace(r, rollout=index) for index, r in enumerate(order)]
        rounds = Rounds(work, strategy, drawn, exclude_truncated=False)
        if rounds.next_round():
            raise InputError(
                f"the pool of task {task.task_id} is too small for {strategy}: label with more "
                "--rollouts"
            )
        return work


def load_pool(folder: Path, *, drawable: int, max_steps: int, completer: str) -> list[TaskPool]:
    """Read a folder of `prm label` with many rollouts per state.

    Parameters
    ----------
    folder : Path
        Made with ``--strategy fixed``.
    drawable : int
        Rollouts of each state that simulated runs may be given; the rest measure the truth.
    max_steps : int
        Step limit of the run.
    completer : str
        Whose rollouts they are.

    Returns
    -------
    list of TaskPool
        One per task with a trajectory that can be continued.
    """
    pools = []
    with (
        TrajectoryFile(folder / "trajectories.jsonl") as trajectories,
        Ledger(folder / "evidence.jsonl", completer=completer) as ledger,
    ):
        for task_id in trajectories.task_ids:
            found = trajectories.of_task(task_id)
            pool: dict[State, list[Rollout]] = defaultdict(list)
            rest: list[Rollout] = []
            for rollout in ledger.rollouts_of(task_id):
                if rollout.rollout < drawable:
                    pool[rollout.state].append(rollout)
                else:
                    rest.append(rollout)
            work = TaskWork(found[0].task, found, max_steps=max_steps, same="text")
            for rollout in rest:
                work.count(rollout)
            counts = {
                node.state: node.counts.usable(exclude_truncated=False) for node in work.nodes
            }
            if any(n == 0 for n, _ in counts.values()):
                raise InputError(
                    f"{folder}: task {task_id} has a state with at most {drawable} rollouts: label "
                    "with more --rollouts, or lower --drawable"
                )
            pools.append(
                TaskPool(
                    trajectories=work.trajectories,
                    rollouts=dict(pool),
                    truth={state: Truth(n=n, c=c) for state, (n, c) in counts.items()},
                    max_steps=max_steps,
                )
            )
    return pools
