"""``python -m benchmarks best-of-n``: choose among N answers by PRM, beside vote and mean."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.tasks.answers import plain_number
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import StepScores, Trajectory
from trajectory.store import read_jsonl


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """Compare ways of choosing one trajectory per task."""

    trajectories: Path
    """Several trajectories per task, .jsonl."""
    scores: tuple[Path, ...]
    """One or more `prm score` files for these trajectories."""
    out: Path | None = None
    """JSON file for the numbers."""
    resamples: int = 4000
    """Bootstrap resamples of tasks behind the 95 % intervals."""
    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One trajectory as the choosers see it."""

    answer: str | None
    outcome: float
    """1.0 right; a cut-off trajectory counts 0."""
    score: float
    """PRM value of its last state."""


def canonical_answer(answer: str) -> str:
    """Return the text that equal answers share.

    Examples
    --------
    >>> canonical_answer("1,000.0 apples") == canonical_answer("1000")
    True
    """
    number = plain_number(answer)
    return " ".join(answer.casefold().split()) if number is None else str(number[0])


def majority_vote(candidates: Sequence[Candidate]) -> float:
    """Return the expected outcome of the most frequent answer (ties share equally).

    Examples
    --------
    >>> def c(answer, outcome): return Candidate(answer=answer, outcome=outcome, score=0.0)
    >>> majority_vote([c("7", 1.0), c("7.0", 1.0), c("8", 0.0)])
    1.0
    >>> majority_vote([c("7", 1.0), c("8", 0.0), c(None, 0.0), c(None, 0.0)])
    0.5
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for candidate in candidates:
        if candidate.answer is not None:
            votes[canonical_answer(candidate.answer)].append(candidate.outcome)
    if not votes:
        return 0.0
    most = max(len(outcomes) for outcomes in votes.values())
    winners = [np.mean(outcomes) for outcomes in votes.values() if len(outcomes) == most]
    return float(np.mean(winners))


def best_of_n(candidates: Sequence[Candidate]) -> float:
    """Return the expected outcome of the highest-scored candidate (ties share equally).

    Examples
    --------
    >>> def c(score, outcome): return Candidate(answer="", outcome=outcome, score=score)
    >>> best_of_n([c(0.9, 0.0), c(0.9, 1.0), c(0.1, 1.0)])
    0.5
    """
    top = max(candidate.score for candidate in candidates)
    return float(np.mean([c.outcome for c in candidates if c.score == top]))


def mean_outcome(candidates: Sequence[Candidate]) -> float:
    """Return the accuracy of one candidate drawn at random."""
    return float(np.mean([c.outcome for c in candidates]))


def oracle(candidates: Sequence[Candidate]) -> float:
    """Return 1 if any candidate is right: what a perfect chooser would get."""
    return max(c.outcome for c in candidates)


def compare(config: BestOfNConfig) -> dict[str, dict[str, float]]:
    """Print and return every chooser's accuracy over tasks with its bootstrap interval.

    Parameters
    ----------
    config : BestOfNConfig
        Trajectories and score files.

    Returns
    -------
    dict
        Chooser -> ``value``, ``low``, ``high`` and the difference to the mean outcome with its
        own paired interval.

    Raises
    ------
    InputError
        If a trajectory has no score, or no usable trajectory is left.
    """
    trajectories = [t for t in read_jsonl(config.trajectories, Trajectory) if not t.stop.failed]
    if not trajectories:
        raise InputError(f"{config.trajectories} holds no usable trajectory: nothing to choose")
    first = _by_task(trajectories, config.scores[0])
    rows = {
        "mean (random choice)": [mean_outcome(c) for c in first],
        "majority vote": [majority_vote(c) for c in first],
    }
    for path in config.scores:
        name = f"best by PRM ({path.stem})"
        rows[name] = [best_of_n(c) for c in _by_task(trajectories, path)]
    rows["oracle"] = [oracle(c) for c in first]
    result = {
        name: _interval(values, rows["mean (random choice)"], config)
        for name, values in rows.items()
    }
    if config.out is not None:
        body = {"tasks": len(first), "trajectories": len(trajectories), "choosers": result}
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(body, indent=2) + "\n")
    title = f"One of {len(trajectories) / len(first):.1f} answers, {len(first)} tasks"
    table = Table("chooser", "accuracy", "against mean", title=title)
    for name, r in result.items():
        table.add_row(
            name,
            f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]",
            f"{r['gain']:+.3f} [{r['gain_low']:+.3f}, {r['gain_high']:+.3f}]",
        )
    Console().print(table)
    return result


def _by_task(trajectories: Sequence[Trajectory], path: Path) -> list[list[Candidate]]:
    """Group candidates by task, with the scores of one file."""
    scores = {s.trajectory_id: s.values[-1] for s in read_jsonl(path, StepScores)}
    tasks: dict[str, list[Candidate]] = defaultdict(list)
    for t in trajectories:
        if t.trajectory_id not in scores:
            raise InputError(f"{path} has no score for trajectory {t.trajectory_id!r}")
        tasks[t.task.task_id].append(
            Candidate(answer=t.answer, outcome=t.outcome or 0.0, score=scores[t.trajectory_id])
        )
    return list(tasks.values())


def _interval(
    values: Sequence[float], reference: Sequence[float], config: BestOfNConfig
) -> dict[str, float]:
    """Return mean and gain over the reference, with paired bootstrap intervals over tasks."""
    rng = np.random.default_rng(config.seed)
    draws_RN = rng.integers(len(values), size=(config.resamples, len(values)))
    value_N, gain_N = np.asarray(values), np.asarray(values) - np.asarray(reference)
    low, high = np.quantile(value_N[draws_RN].mean(1), [0.025, 0.975])
    gain_low, gain_high = np.quantile(gain_N[draws_RN].mean(1), [0.025, 0.975])
    return {
        "value": float(value_N.mean()),
        "low": float(low),
        "high": float(high),
        "gain": float(gain_N.mean()),
        "gain_low": float(gain_low),
        "gain_high": float(gain_high),
    }
