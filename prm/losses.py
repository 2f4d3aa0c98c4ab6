"""Losses over scored positions: pure functions that return *sums*, never means.

Dimension letters beside the project's own: P scored positions of a batch, C classes.

A sum is what makes training exact: the trainer adds the sums of all micro-batches of an optimizer
step and divides once by the step's global denominator, so loss and gradient do not depend on how
the step was split or padded. Masked positions have weight 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

RANKING_MARGIN = 4.0
"""``zeta`` of the ranking loss in the authors' experiments (arXiv:2410.11287)."""

_NO_SCORE = -1e30
"""Stands for minus infinity, whose gradient would be no number."""


def binomial_nll(
    logits_P: torch.Tensor, *, correct_P: torch.Tensor, rollouts_P: torch.Tensor
) -> torch.Tensor:
    """Sum the negative log-likelihood of Monte-Carlo counts under predicted probabilities.

    Parameters
    ----------
    logits_P : Tensor, shape (P,)
        Log-odds of success.
    correct_P : Tensor, shape (P,)
        Successful rollouts ``c``, in [0, n].
    rollouts_P : Tensor, shape (P,)
        Usable rollouts ``n``; 0 masks the position.

    Returns
    -------
    Tensor, shape ()
        ``sum_i -[c_i log p_i + (n_i - c_i) log(1 - p_i)]`` with ``p = sigmoid(logit)``, nats.

    Notes
    -----
    Computed as ``n softplus(z) - c z``, which is exact for any ``z``. A state measured with 64
    rollouts weighs sixteen times one measured with 4; the constant ``log C(n, c)`` is left out.

    Examples
    --------
    >>> import math
    >>> nll = binomial_nll(torch.zeros(1), correct_P=torch.ones(1), rollouts_P=torch.tensor([4.0]))
    >>> math.isclose(nll.item(), 4 * math.log(2), rel_tol=1e-6)
    True
    """
    return (rollouts_P * F.softplus(logits_P) - correct_P * logits_P).sum()


def soft_cross_entropy(
    logits_PC: torch.Tensor, *, targets_P: torch.Tensor, weights_P: torch.Tensor
) -> torch.Tensor:
    """Sum the two-class cross-entropy against soft targets.

    Parameters
    ----------
    logits_PC : Tensor, shape (P, 2)
        Logits of the classes wrong (0) and right (1).
    targets_P : Tensor, shape (P,)
        Probability of the class right, in [0, 1]; not rounded.
    weights_P : Tensor, shape (P,)
        1 where the position has a label, 0 where it is masked.

    Returns
    -------
    Tensor, shape ()
        ``sum_i -w_i [y_i log q_i1 + (1 - y_i) log q_i0]`` with ``q = softmax(logits)``, nats.

    Examples
    --------
    >>> loss = soft_cross_entropy(
    ...     torch.tensor([[0.0, 0.0]]), targets_P=torch.tensor([0.3]), weights_P=torch.ones(1)
    ... )
    >>> round(loss.item(), 4)
    0.6931
    """
    log_probs_PC = F.log_softmax(logits_PC, dim=-1)
    right_P, wrong_P = log_probs_PC[:, 1], log_probs_PC[:, 0]
    return -(weights_P * (targets_P * right_P + (1 - targets_P) * wrong_P)).sum()


def ranking_loss(
    logits_P: torch.Tensor,
    *,
    targets_P: torch.Tensor,
    weights_P: torch.Tensor,
    rows_P: torch.Tensor,
    margin: float = RANKING_MARGIN,
) -> torch.Tensor:
    """Sum the comparative loss of PQM: right steps above zero and rising, wrong ones far below.

    Parameters
    ----------
    logits_P : Tensor, shape (P,)
        Scores Q, one per position, in the order of the steps.
    targets_P : Tensor, shape (P,)
        A position is right where this is at least 1/2, else wrong.
    weights_P : Tensor, shape (P,)
        0 masks a position; any other weight counts as 1.
    rows_P : Tensor, shape (P,)
        Trajectory of each position, ascending; only steps of one trajectory are compared.
    margin : float, default=4
        ``zeta``, how far wrong steps are pushed down.

    Returns
    -------
    Tensor, shape ()
        Summed over trajectories, nats; 0 for one whose positions are all masked.

    Notes
    -----
    With right steps ``c_1 .. c_n`` in order, wrong steps ``W`` and ``Q(c_0) = 0``::

        - sum_{t=0}^{n} log [ exp Q(c_t)
                              / (sum_{q<=t} exp Q(c_q) + sum_{w in W} exp(Q(w) + zeta)) ]

    The zero makes the scores of different trajectories comparable. The paper divides by n, here
    the trainer divides by all labelled positions, so that the loss is a sum over trajectories. The
    scores are no log-odds: only calibration makes probabilities of them.

    References
    ----------
    .. [1] Li and Li, Process Reward Model with Q-value Rankings, arXiv:2410.11287, eq. 10.

    Examples
    --------
    A right and then a wrong step, both scored 0, margin 0: ``log 2`` for zero itself, which stands
    beside the wrong step, and ``log 3`` for the right one.

    >>> loss = ranking_loss(
    ...     torch.zeros(2),
    ...     targets_P=torch.tensor([1.0, 0.0]),
    ...     weights_P=torch.ones(2),
    ...     rows_P=torch.zeros(2, dtype=torch.long),
    ...     margin=0.0,
    ... )
    >>> round(loss.item(), 4)  # log 2 + log 3
    1.7918
    """
    rows, sizes = torch.unique_consecutive(rows_P, return_counts=True)
    starts = torch.cumsum(sizes, 0) - sizes
    index_P = torch.repeat_interleave(torch.arange(len(rows), device=rows_P.device), sizes)
    place_P = torch.arange(len(rows_P), device=rows_P.device) - starts[index_P]
    shape = (len(rows), int(sizes.max()))
    labelled_P, right_P = weights_P > 0, targets_P >= 0.5

    def spread(values_P: torch.Tensor, used_P: torch.Tensor) -> torch.Tensor:
        """Lay positions out as (rows, steps); the others have a score of minus infinity."""
        empty_BS = values_P.new_full(shape, _NO_SCORE)
        kept_P = torch.where(used_P, values_P, values_P.new_tensor(_NO_SCORE))
        return empty_BS.index_put((index_P, place_P), kept_P)

    right_BS = spread(logits_P, labelled_P & right_P)
    wrong_BS = spread(logits_P + margin, labelled_P & ~right_P)
    anchored_BS = torch.cat([logits_P.new_zeros(shape[0], 1), right_BS], dim=1)
    wrong_B1 = torch.logsumexp(wrong_BS, dim=1, keepdim=True)
    total_BS = torch.logaddexp(torch.logcumsumexp(anchored_BS, dim=1), wrong_B1)
    return torch.where(anchored_BS > _NO_SCORE, total_BS - anchored_BS, 0.0).sum()
