"""Learning rates and step sizes: what is chosen by model and data, and how the rate moves."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from prm.model import num_trainable

WARMUP_SHARE = 0.1
"""Share of all steps over which the learning rate rises from 0."""


def default_learning_rate(model: nn.Module, *, lora: bool) -> float:
    """Choose a learning rate by size: 1e-3 at a million parameters, falling with the square root.

    LoRA uses 2e-4 at any size (its updates are low-rank, hence larger rates are stable).
    """
    if lora:
        return 2e-4
    return float(np.clip(1e-3 * math.sqrt(1e6 / num_trainable(model)), 1e-5, 1e-3))


def default_step_tokens(epoch_tokens: int) -> int:
    """Choose the size of an optimizer step: about 32 steps an epoch, 2048 to 16384 tokens each.

    Examples
    --------
    >>> default_step_tokens(30_000), default_step_tokens(160_000), default_step_tokens(10**7)
    (2048, 5000, 16384)
    """
    return min(max(epoch_tokens // 32, 2048), 16_384)


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero.

    Examples
    --------
    >>> [round(learning_rate_at(s, 20, 1.0), 3) for s in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
