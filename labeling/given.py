"""Takes trajectories that exist already into a labelling run, after checking that they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from agent.chat import ChatFormat
from labeling.ledger import line_number
from trajectory.errors import InputError
from trajectory.records import Task, Trajectory
from trajectory.store import read_jsonl, write_jsonl


def check_given(source: Path, domain: str) -> None:
    """Refuse a file whose trajectories cannot all be labelled.

    Parameters
    ----------
    source : Path
        A ``.jsonl`` file of `Trajectory` lines.
    domain : str
        Name of the domain that will judge the continuations.

    Raises
    ------
    InputError
        If the file is missing, empty or malformed, repeats an id, holds tasks of another domain
        or two tasks with one id, or has a step without a tool call before the last; the message
        has the line number.
    """
    seen: set[str] = set()
    tasks: dict[str, int] = {}
    for ordinal, trajectory in enumerate(read_jsonl(source, Trajectory)):
        problem = _problem(trajectory, domain)
        task = trajectory.task
        if trajectory.trajectory_id in seen:
            problem = "repeats an id of an earlier line"
        elif tasks.setdefault(task.task_id, _fingerprint(task)) != _fingerprint(task):
            problem = problem or f"has another task than earlier lines with id {task.task_id!r}"
        if problem is not None:
            raise InputError(
                f"{source}, line {line_number(source, ordinal)}: trajectory "
                f"{trajectory.trajectory_id!r} {problem}"
            )
        seen.add(trajectory.trajectory_id)
    if not seen:
        raise InputError(f"{source} holds no trajectory: there is nothing to label")


def copy_given(
    source: Path, destination: Path, chat: ChatFormat, *, shard: tuple[int, int] = (0, 1)
) -> int:
    """Copy checked trajectories into the run's folder.

    Token ids are kept only where this tokenizer reads them as the recorded text; other
    trajectories (another model's, another framework's) lose them and are encoded from their text
    when continued. Recorded prompt ids are always dropped: continuations start from this agent's
    own prompt, as those of the shared prefix 0 do.

    Parameters
    ----------
    source : Path
        Accepted by `check_given`.
    destination : Path
        Replaced as a whole.
    chat : ChatFormat
        Of the agent that will continue them.
    shard : tuple of int, default=(0, 1)
        ``(i, n)``: take every n-th task from the i-th on, in the order of their first
        trajectories.

    Returns
    -------
    int
        Trajectories whose token ids were dropped.

    Raises
    ------
    InputError
        If the shard holds no task.
    """
    dropped = 0
    index, parts = shard
    numbers: dict[str, int] = {}

    def copies() -> Iterator[Trajectory]:
        nonlocal dropped
        for trajectory in read_jsonl(source, Trajectory):
            number = numbers.setdefault(trajectory.task.task_id, len(numbers))
            if number % parts == index:
                kept = _with_own_ids(trajectory, chat)
                dropped += kept.steps != trajectory.steps
                yield kept

    if not write_jsonl(destination, copies()):
        raise InputError(empty_shard(shard, len(numbers)))
    return dropped


def empty_shard(shard: tuple[int, int], tasks: int) -> str:
    """Say that a shard holds nothing."""
    return (
        f"--shard {shard[0]}/{shard[1]} holds none of the {tasks} tasks: use at most {tasks} shards"
    )


def _fingerprint(task: Task) -> int:
    """Reduce a task to what continuations of its prompt depend on."""
    return hash((task.domain, task.prompt, task.answer))


def _problem(trajectory: Trajectory, domain: str) -> str | None:
    """Say why a trajectory cannot be labelled; None if it can."""
    if trajectory.task.domain != domain:
        return f"is of the domain {trajectory.task.domain!r}, --tasks names {domain!r}"
    for number, step in enumerate(trajectory.steps[:-1], start=1):
        if not step.calls:
            return (
                f"has no tool call in step {number} of {trajectory.num_steps}: a turn without a "
                "call ends an episode, so there is no state to continue"
            )
    return None


def _with_own_ids(trajectory: Trajectory, chat: ChatFormat) -> Trajectory:
    """Keep token ids only if they are of this tokenizer."""
    steps = trajectory.steps
    if any(s.token_ids is not None and chat.decode(s.token_ids) != s.text for s in steps):
        steps = tuple(
            replace(s, token_ids=None, logprobs=None, observation_ids=None) for s in steps
        )
    return replace(trajectory, steps=steps, prompt_ids=None)
