"""One step's trajectories -> rows with advantages, and the numbers a person watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from policy.advantages import Estimator, Group, has_outcome_variance, scale_advantages
from policy.batch import TokenRow, token_row
from policy.rewards import outcome_reward, prefix_values
from trajectory.records import StepScores, StopReason, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """What a batch of groups gives the optimizer."""

    rows: tuple[TokenRow, ...]
    """One per trajectory that carries signal and has action tokens."""
    groups_used: int
    groups_skipped: int
    """Groups without signal: equal outcomes where only outcomes count, or too few trajectories."""


def assign_credit(
    groups: Sequence[Sequence[Trajectory]],
    scores: Mapping[str, StepScores] | None,
    *,
    estimator: Estimator,
    gae_lambda: float,
) -> Credit:
    """Turn groups of trajectories into rows for the loss.

    Parameters
    ----------
    groups : sequence of sequences of Trajectory
        Trajectories sampled for one task each; failed ones are left out here.
    scores : mapping of trajectory id to StepScores, or None
        Of every usable trajectory where the estimator needs values.
    estimator : Estimator
        Row of `ADVANTAGES`.
    gae_lambda : float
        Handed to the estimator.

    Returns
    -------
    Credit
        With advantages scaled by the batch's size (see `scale_advantages`).

    Raises
    ------
    KeyError
        If a trajectory that needs a score has none: missing is not zero.
    ValueError
        If ids, log-probabilities or prefix scores are missing.
    """
    kept: list[Trajectory] = []
    advantages: list[np.ndarray] = []
    used = 0
    for members in groups:
        usable = [t for t in members if outcome_reward(t) is not None]
        if len(usable) < estimator.min_group:
            continue
        group = _group(usable, scores if estimator.needs_values else None)
        if not estimator.keeps_equal_outcomes and not has_outcome_variance(group):
            continue
        used += 1
        kept += usable
        advantages += estimator.function(group, gae_lambda)
    rows = (token_row(t, a) for t, a in zip(kept, scale_advantages(advantages), strict=True))
    return Credit(
        rows=tuple(row for row in rows if row.num_actions),
        groups_used=used,
        groups_skipped=len(groups) - used,
    )


def _group(usable: Sequence[Trajectory], scores: Mapping[str, StepScores] | None) -> Group:
    """Collect rewards and values of the usable trajectories of one task."""
    return Group(
        outcomes=np.array([outcome_reward(t) for t in usable], dtype=np.float64),
        num_steps=tuple(t.num_steps for t in usable),
        values=None
        if scores is None
        else tuple(prefix_values(t, scores[t.trajectory_id]) for t in usable),
    )


def batch_metrics(
    trajectories: Sequence[Trajectory], scores: Mapping[str, StepScores] | None
) -> dict[str, float]:
    """Describe the trajectories of one step.

    Parameters
    ----------
    trajectories : sequence of Trajectory
        All of the step, failed ones included.
    scores : mapping of trajectory id to StepScores, or None
        PRM scores of the usable ones.

    Returns
    -------
    dict
        ``outcome`` (mean reward of usable trajectories), ``tokens``, ``steps``, ``tool_calls`` per
        usable episode, ``stop/REASON`` shares of all, ``failed`` count. With scores also
        ``prm_mean`` (mean value over prefixes 1..S), ``prm_last`` (mean value after the last step),
        ``prm_gap`` (``prm_last - outcome``: growing means that the policy pleases the PRM, not the
        checker) and ``prm_auroc`` (of the last value against the outcome; left out where all
        outcomes agree).
    """
    usable = [t for t in trajectories if not t.stop.failed]
    metrics = {"failed": float(len(trajectories) - len(usable))}
    for reason in StopReason:
        share = sum(t.stop is reason for t in trajectories) / max(1, len(trajectories))
        metrics[f"stop/{reason.value}"] = share
    if not usable:
        return metrics
    rewards = np.array([outcome_reward(t) for t in usable], dtype=np.float64)
    metrics |= {
        "outcome": float(rewards.mean()),
        "tokens": float(np.mean([t.num_generated_tokens for t in usable])),
        "steps": float(np.mean([t.num_steps for t in usable])),
        "tool_calls": float(np.mean([sum(len(s.calls) for s in t.steps) for t in usable])),
    }
    return metrics if scores is None else metrics | _prm_metrics(usable, rewards, scores)


def _prm_metrics(
    usable: Sequence[Trajectory], rewards: np.ndarray, scores: Mapping[str, StepScores]
) -> dict[str, float]:
    """Compare what the PRM says with what the checker says."""
    values = [prefix_values(t, scores[t.trajectory_id]) for t in usable]
    last = np.array([v[-1] for v in values])
    metrics = {
        "prm_mean": float(np.mean(np.concatenate([v[1:] for v in values]))),
        "prm_last": float(last.mean()),
        "prm_gap": float(last.mean() - rewards.mean()),
    }
    solved = rewards >= 0.5
    if solved.any() and not solved.all():
        metrics["prm_auroc"] = float(roc_auc_score(solved, last))
    return metrics
