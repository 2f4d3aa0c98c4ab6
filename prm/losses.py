"""Losses over scored positions: pure functions that return *sums*, never means.

Dimension letters beside the project's own: P scored positions of a batch, C classes.

A sum is what makes training exact: the trainer adds the sums of all micro-batches of an optimizer
step and divides once by the step's global denominator, so loss and gradient do not depend on how
the step was split or padded. Masked positions have weight 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
