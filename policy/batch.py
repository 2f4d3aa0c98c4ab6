"""Trajectories with token ids -> flat rows -> padded micro-batches for the loss.

Only *action tokens*, the ids the policy sampled, have a log-probability, an advantage and a place
in the loss. Prompt and observation tokens are context: they are in no mean, no length and no
denominator. Nothing is tokenized here; ids are used exactly as they were sampled.

Dimension letters: B batch, T tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trajectory.records import Trajectory

ItemT = TypeVar("ItemT", int, float)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenRow:
    """One trajectory as flat arrays over its T tokens."""

    trajectory_id: str
    input_ids: NDArray[np.int64]
    """Prompt, then every turn and the observation after it, shape (T,)."""
    action_mask: NDArray[np.bool_]
    """True where the policy sampled the token, shape (T,)."""
    advantages: NDArray[np.float64]
    """The step's advantage on its action tokens, 0 elsewhere, shape (T,)."""
    logprobs: NDArray[np.float64]
    """The sampler's log-probability of action tokens, 0 elsewhere, shape (T,)."""

    @property
    def num_actions(self) -> int:
        """Number of action tokens."""
        return int(self.action_mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """Rows padded on the right to one length; every tensor has shape (B, T)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """1 on real tokens, 0 on padding."""
    action_mask: torch.Tensor
    """True on action tokens."""
    advantages: torch.Tensor
    logprobs: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same batch on a device."""
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            action_mask=self.action_mask.to(device),
            advantages=self.advantages.to(device),
            logprobs=self.logprobs.to(device),
        )


def token_row(trajectory: Trajectory, advantages_S: NDArray[np.float64]) -> TokenRow:
    """Flatten one trajectory.

    Parameters
    ----------
    trajectory : Trajectory
        With prompt ids and, for every step, sampled ids and log-probabilities; every step but the
        last has observation ids.
    advantages_S : ndarray, shape (S,)
        Advantage of each step; all action tokens of the step get it.

    Returns
    -------
    TokenRow
        ``input_ids`` is the exact concatenation of all ids. Tokens of a step with an injected
        fault (``perturbation``) are context, not action: the policy did not choose them.

    Raises
    ------
    ValueError
        If ids or log-probabilities are missing, the number of advantages is not S, or sampling was
        greedy, top-p or top-k: those log-probabilities are not the policy's own.
    """
    _refuse_truncated_sampling(trajectory)
    if len(advantages_S) != trajectory.num_steps:
        raise ValueError(
            f"{trajectory.trajectory_id}: {len(advantages_S)} advantages for "
            f"{trajectory.num_steps} steps"
        )
    ids: list[int] = list(_known(trajectory, "prompt_ids", trajectory.prompt_ids or None))
    mask = [False] * len(ids)
    advantages = [0.0] * len(ids)
    logprobs = [0.0] * len(ids)
    for k, (step, advantage) in enumerate(zip(trajectory.steps, advantages_S, strict=True)):
        turn = _known(trajectory, f"token_ids of step {k + 1}", step.token_ids)
        sampled = step.perturbation is None
        ids += turn
        mask += [sampled] * len(turn)
        advantages += [float(advantage) if sampled else 0.0] * len(turn)
        if sampled:
            logprobs += _known(trajectory, f"logprobs of step {k + 1}", step.logprobs)
        else:
            logprobs += [0.0] * len(turn)
        observed = step.observation_ids
        if observed is None and k + 1 < trajectory.num_steps:
            _known(trajectory, f"observation_ids of step {k + 1}", observed)
        context = observed or ()
        ids += context
        mask += [False] * len(context)
        advantages += [0.0] * len(context)
        logprobs += [0.0] * len(context)
    return TokenRow(
        trajectory_id=trajectory.trajectory_id,
        input_ids=np.asarray(ids, dtype=np.int64),
        action_mask=np.asarray(mask, dtype=np.bool_),
        advantages=np.asarray(advantages, dtype=np.float64),
        logprobs=np.asarray(logprobs, dtype=np.float64),
    )


def _refuse_truncated_sampling(trajectory: Trajectory) -> None:
    """Refuse trajectories drawn from another distribution than the tempered softmax."""
    sampling = trajectory.sampling
    if sampling.top_p < 1 or sampling.top_k or sampling.temperature == 0:
        raise ValueError(
            f"{trajectory.trajectory_id} was sampled with top_p {sampling.top_p}, top_k "
            f"{sampling.top_k}, temperature {sampling.temperature}: RL needs plain sampling"
        )


def _known(trajectory: Trajectory, what: str, value: tuple[ItemT, ...] | None) -> tuple[ItemT, ...]:
    """Return a tuple that must be there."""
    if value is None:
        raise ValueError(
            f"{trajectory.trajectory_id} has no {what}: a policy is trained on the exact ids and "
            "log-probabilities it sampled, so trajectories that came as text cannot be used"
        )
    return value


def micro_batches(rows: Sequence[TokenRow], max_tokens: int) -> list[list[TokenRow]]:
    """Group rows of similar length so that each padded batch holds at most ``max_tokens``.

    Parameters
    ----------
    rows : sequence of TokenRow
        In any order; the result depends only on their content.
    max_tokens : int
        Bound on rows times longest row, padding included. A longer single row gets a batch of
        its own.

    Returns
    -------
    list of list of TokenRow
        Every row once, longest first.

    Examples
    --------
    >>> from types import SimpleNamespace as Row
    >>> rows = [Row(trajectory_id=str(n), input_ids=np.zeros(n)) for n in (2, 9, 4, 4)]
    >>> [[len(r.input_ids) for r in batch] for batch in micro_batches(rows, 8)]
    [[9], [4, 4], [2]]
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be >= 1, not {max_tokens}")
    batches: list[list[TokenRow]] = []
    width = 0
    for row in sorted(rows, key=lambda r: (-len(r.input_ids), r.trajectory_id)):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(row.input_ids)
        batches[-1].append(row)
    return batches


def collate(rows: Sequence[TokenRow], *, pad_id: int, length: int | None = None) -> MicroBatch:
    """Pad rows on the right and stack them.

    Parameters
    ----------
    rows : sequence of TokenRow, length B >= 1
        The rows.
    pad_id : int
        Id written on padding; it is attended to by nothing and is in no loss.
    length : int, optional
        T; the longest row by default.

    Returns
    -------
    MicroBatch
    """
    width = max(len(row.input_ids) for row in rows) if length is None else length
    shape = (len(rows), width)
    ids_BT = np.full(shape, pad_id, dtype=np.int64)
    real_BT = np.zeros(shape, dtype=np.int64)
    action_BT = np.zeros(shape, dtype=np.bool_)
    advantages_BT = np.zeros(shape, dtype=np.float32)
    logprobs_BT = np.zeros(shape, dtype=np.float32)
    for b, row in enumerate(rows):
        end = len(row.input_ids)
        ids_BT[b, :end] = row.input_ids
        real_BT[b, :end] = 1
        action_BT[b, :end] = row.action_mask
        advantages_BT[b, :end] = row.advantages
        logprobs_BT[b, :end] = row.logprobs
    return MicroBatch(
        input_ids=torch.from_numpy(ids_BT),
        attention_mask=torch.from_numpy(real_BT),
        action_mask=torch.from_numpy(action_BT),
        advantages=torch.from_numpy(advantages_BT),
        logprobs=torch.from_numpy(logprobs_BT),
    )
