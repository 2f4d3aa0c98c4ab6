"""Counts of a trajectory's prefixes, and which of them can be continued at all.

Prefix S of a trajectory that was judged is its own continuation: it counts as K identical
rollouts at no cost, neither run nor written. One that a limit cut off likewise counts as K
truncated rollouts, unless it ended at a step limit below the continuing agent's: then there is
something left to run.
"""

from __future__ import annotations

from labeling.ledger import Ledger, Tally
from trajectory.records import Sampling, StepEvidence, StopReason, Trajectory


def open_prefixes(trajectory: Trajectory, max_steps: int) -> range:
    """Return the prefixes, 0 aside, from which there is something left to run.

    Parameters
    ----------
    trajectory : Trajectory
        With S steps.
    max_steps : int
        Step limit of the agent that would continue it.

    Returns
    -------
    range
        ``1 .. S - 1``, and S if only a step limit below ``max_steps`` ended the trajectory; empty
        if broken infrastructure ended it.
    """
    if trajectory.stop.failed:
        return range(0)
    last = trajectory.num_steps
    resumable = (
        trajectory.stop is StopReason.MAX_STEPS
        and 0 < last < max_steps
        and bool(trajectory.steps[-1].calls)
    )
    return range(1, last + 1 if resumable else last)


def step_evidence(
    trajectory: Trajectory, ledger: Ledger, *, rollouts: int, max_steps: int, sampling: Sampling
) -> StepEvidence:
    """Collect the counts of every prefix 0..S of one trajectory.

    Parameters
    ----------
    trajectory : Trajectory
        Not ended by broken infrastructure.
    ledger : Ledger
        With its finished rollouts.
    rollouts : int
        K; what a terminal prefix counts for.
    max_steps : int
        Step limit of the agent.
    sampling : Sampling
        How the rollouts were sampled.

    Returns
    -------
    StepEvidence
        ``tokens`` holds all tokens its counts cost, those of the shared prefix 0 included, so
        summed over the trajectories of a task it counts these more than once.
    """
    last = trajectory.num_steps
    run = open_prefixes(trajectory, max_steps)
    tallies = [ledger.tally((trajectory.task.task_id, 0))]
    tallies += [ledger.tally((trajectory.trajectory_id, t)) for t in run]
    if len(tallies) == last:
        tallies.append(_terminal_tally(trajectory, rollouts))
    return StepEvidence(
        trajectory_id=trajectory.trajectory_id,
        rollouts=tuple(t.rollouts for t in tallies),
        correct=tuple(t.correct for t in tallies),
        truncated=tuple(t.truncated for t in tallies),
        failed=tuple(t.failed for t in tallies),
        completer=ledger.completer,
        sampling=sampling,
        tokens=sum(t.tokens for t in tallies),
    )


def _terminal_tally(trajectory: Trajectory, rollouts: int) -> Tally:
    """Count the end of a trajectory as its own continuation."""
    right = trajectory.outcome is not None and trajectory.outcome >= 0.5
    return Tally(
        settled=(1 << rollouts) - 1,
        correct=rollouts if right else 0,
        truncated=rollouts if trajectory.stop.truncated else 0,
    )
