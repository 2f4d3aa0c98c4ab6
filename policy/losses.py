"""The policy loss: a clipped ratio per token over one global denominator.

Dimension letters: N action tokens of one micro-batch, all rows flattened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStats:
    """Sums over action tokens, so that micro-batches add up exactly."""

    tokens: int = 0
    ratio_sum: float = 0.0
    """Of the probability ratio present / step start."""
    ratio_max: float = 0.0
    clipped: int = 0
    """Tokens whose gradient the clip set to zero."""
    weight_sum: float = 0.0
    """Of the truncated importance weight trainer / sampler."""
    kl_sum: float = 0.0
    """Of the estimate of KL(sampler || present policy)."""
    entropy_sum: float = 0.0

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(
            tokens=self.tokens + other.tokens,
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_max=max(self.ratio_max, other.ratio_max),
            clipped=self.clipped + other.clipped,
            weight_sum=self.weight_sum + other.weight_sum,
            kl_sum=self.kl_sum + other.kl_sum,
            entropy_sum=self.entropy_sum + other.entropy_sum,
        )

    def metrics(self) -> dict[str, float]:
        """Return means over tokens, by name; empty if there were none."""
        if not self.tokens:
            return {}
        return {
            "entropy": self.entropy_sum / self.tokens,
            "ratio_mean": self.ratio_sum / self.tokens,
            "ratio_max": self.ratio_max,
            "clip_share": self.clipped / self.tokens,
            "sampler_weight_mean": self.weight_sum / self.tokens,
            "kl_to_sampler": self.kl_sum / self.tokens,
        }


def policy_loss(
    logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    old_logprobs_N: torch.Tensor,
    sampler_logprobs_N: torch.Tensor,
    denominator: int,
    clip: tuple[float, float] = (0.2, 0.28),
    max_weight: float = 2.0,
) -> tuple[torch.Tensor, LossStats]:
    """Return the clipped policy-gradient loss of one micro-batch and its sums.

    Parameters
    ----------
    logprobs_N : Tensor, shape (N,)
        Log-probability of each action token under the present weights, with gradient.
    advantages_N : Tensor, shape (N,)
        Advantage of the token's step.
    old_logprobs_N : Tensor, shape (N,)
        The trainer's own log-probabilities at the start of the step, no gradient.
    sampler_logprobs_N : Tensor, shape (N,)
        What the engine said when it sampled, no gradient.
    denominator : int
        Action tokens of the *whole* optimizer step, all micro-batches together, >= 1.
    clip : (float, float), default=(0.2, 0.28)
        How far the ratio may fall below and rise above 1 before the gradient stops; a wider upper
        side lets unlikely tokens grow [2]_.
    max_weight : float, default=2.0
        Bound on the trainer/sampler importance weight, >= 1.

    Returns
    -------
    loss : Tensor, scalar
    stats : LossStats
        Without entropy, which needs the whole distribution.

    Raises
    ------
    ValueError
        If shapes differ or the denominator is not positive.

    Notes
    -----
    With ``rho = pi / pi_old`` and ``w = min(pi_old / pi_sampler, max_weight)``::

        loss = - 1 / denominator * sum_n w_n min(rho_n A_n, clip(rho_n, 1 - low, 1 + high) A_n)

    The clipped surrogate is [1]_ equation 7, the asymmetric clip [2]_ equation 10. ``w`` has no
    gradient and corrects the numerical difference between the engine's and the trainer's forward
    pass (cached decoding, half precision); it is 1 up to rounding in float32. One denominator
    makes the gradient the same for any split into micro-batches and any padding. The KL term is
    only a metric: ``mean(exp(d) - 1 - d)``, ``d = log pi - log pi_sampler``, >= 0.

    References
    ----------
    .. [1] Schulman et al., Proximal policy optimization, arXiv:1707.06347.
    .. [2] Yu et al., DAPO, arXiv:2503.14476.

    Examples
    --------
    >>> old = torch.log(torch.tensor([0.5, 0.5]))
    >>> new = torch.log(torch.tensor([0.5, 0.75]))
    >>> loss, stats = policy_loss(
    ...     new, torch.tensor([1.0, 1.0]), old_logprobs_N=old, sampler_logprobs_N=old, denominator=2
    ... )
    >>> round(loss.item(), 4), stats.clipped  # -(1 + 1.28) / 2, and the ratio 1.5 is clipped
    (-1.14, 1)
    """
    shapes = {t.shape for t in (logprobs_N, advantages_N, old_logprobs_N, sampler_logprobs_N)}
    if len(shapes) != 1 or logprobs_N.ndim != 1:
        raise ValueError(f"log-probabilities and advantages must have one shape (N,), not {shapes}")
    if denominator < 1:
        raise ValueError(f"the denominator must be >= 1 action token, not {denominator}")
    low, high = clip
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    bounded_N = torch.clamp(ratio_N, 1 - low, 1 + high)
    weight_N = torch.exp(old_logprobs_N - sampler_logprobs_N).clamp(max=max_weight)
    surrogate_N = torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    loss = -(weight_N * surrogate_N).sum() / denominator
    with torch.no_grad():
        above_N = (ratio_N > 1 + high) & (advantages_N > 0)
        below_N = (ratio_N < 1 - low) & (advantages_N < 0)
        moved_N = logprobs_N - sampler_logprobs_N
        stats = LossStats(
            tokens=len(ratio_N),
            ratio_sum=float(ratio_N.sum()),
            ratio_max=float(ratio_N.max()) if len(ratio_N) else 0.0,
            clipped=int((above_N | below_N).sum()),
            weight_sum=float(weight_N.sum()),
            kl_sum=float((torch.expm1(moved_N) - moved_N).sum()),
        )
    return loss, stats
