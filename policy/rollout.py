"""Which episodes an optimization step runs, and running them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from agent.episode import Agent, EpisodeSpec, run_episodes
from agent.setup import AgentConfig, load_tasks
from trajectory.errors import InputError
from trajectory.records import Task, Trajectory
from trajectory.seeds import derive_seed


def load_pool(config: AgentConfig, *, needed: int, per_step: int) -> list[Task]:
    """Load the tasks to sample from.

    Parameters
    ----------
    config : AgentConfig
        Without ``num_tasks`` all of a file are taken, or ``needed`` of an endless generator.
    needed : int
        Tasks that the whole run uses, repetitions included.
    per_step : int
        Tasks of one step, all different.

    Raises
    ------
    InputError
        If the source is unusable or holds fewer than ``per_step`` tasks.
    """
    try:
        tasks = load_tasks(config)
    except InputError:
        if config.num_tasks is not None:
            raise
        tasks = load_tasks(replace(config, num_tasks=needed))  # a generator has no end of its own
    if len(tasks) < per_step:
        raise InputError(
            f"{config.tasks!r} gives {len(tasks)} tasks, fewer than --tasks-per-step {per_step}: "
            "give more tasks or fewer per step"
        )
    return tasks


def tasks_of_step(num_tasks: int, per_step: int, *, step: int, seed: int) -> list[int]:
    """Choose the tasks of one step: every pass over the pool in its own random order.

    Parameters
    ----------
    num_tasks : int
        Size of the pool, >= per_step.
    per_step : int
    step : int
        From 0.
    seed : int

    Returns
    -------
    list of int, length per_step
        Indices into the pool, all different. A function of the arguments alone, so a resumed run
        continues where it was. A pass drops its last ``num_tasks % per_step`` tasks.

    Examples
    --------
    >>> passes = [tasks_of_step(6, 3, step=s, seed=0) for s in range(4)]
    >>> sorted(passes[0] + passes[1]) == sorted(passes[2] + passes[3]) == list(range(6))
    True
    """
    steps_per_pass = num_tasks // per_step
    order = list(range(num_tasks))
    Random(derive_seed("task order", seed, step // steps_per_pass)).shuffle(order)  # noqa: S311
    first = (step % steps_per_pass) * per_step
    return order[first : first + per_step]


def episode_specs(
    tasks: Sequence[Task], *, group_size: int, step: int, seed: int
) -> Iterator[EpisodeSpec]:
    """Yield the episodes of one step, group by group."""
    for index, task in enumerate(tasks):
        group = f"step-{step:06d}/{index:03d}:{task.task_id}"
        for member in range(group_size):
            yield EpisodeSpec(
                trajectory_id=f"{group}/{member:03d}",
                task=task,
                seed=derive_seed("optimize", seed, step, index, member),
                group=group,
            )


async def run_groups(
    agent: Agent, specs: Sequence[EpisodeSpec], *, concurrency: int
) -> list[list[Trajectory]]:
    """Run episodes and return them as groups, in the order of the specs.

    Raises
    ------
    InputError
        If more than half of the episodes failed: something is broken, and going on would train on
        an accidental remainder.
    """
    found = {t.trajectory_id: t async for t in run_episodes(agent, specs, concurrency=concurrency)}
    failed = [t for t in found.values() if t.stop.failed]
    if 2 * len(failed) > len(found):
        reasons = sorted({str(t.meta.get("failure", t.stop.value)) for t in failed})
        raise InputError(
            f"{len(failed)} of {len(found)} episodes failed ({reasons[0]}): repair the tools or "
            "the engine and run the same command again to resume"
        )
    groups: dict[str, list[Trajectory]] = {}
    for spec in specs:
        groups.setdefault(spec.group, []).append(found[spec.trajectory_id])
    return list(groups.values())
