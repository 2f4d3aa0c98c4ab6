"""What a model says of labelled examples, for held-out likelihood and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prm.data import Example
from prm.heads import Head
from prm.layout import Layout
from prm.metrics import Array
from prm.model import autocast, logits_at, to_device


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """What a model says of every scored position of examples, in the examples' own order.

    `nll` is the same for all heads and equals `loss` for those that are trained by likelihood.
    """

    margins_P: Array
    """Raw log-odds."""
    targets_P: Array
    weights_P: Array
    sizes: tuple[int, ...]
    """Positions of each example."""
    loss: float
    """The head's own loss per unit of weight, nats: what training minimises."""

    def nll(self) -> float:
        """Negative log-likelihood per unit of weight, nats; NaN where a margin is."""
        z, y, w = self.margins_P, self.targets_P, self.weights_P
        with np.errstate(invalid="ignore"):
            return float((w * (np.logaddexp(0, z) - y * z)).sum() / w.sum())


def predict(
    model: nn.Module,
    examples: Sequence[Example],
    head: Head,
    *,
    layout: Layout,
    batch_tokens: int,
    pad_id: int,
    bfloat16: bool = False,
    inner: bool = False,
) -> Predictions:
    """Run a model over examples without gradients.

    Parameters
    ----------
    model : Module
        What `prm.model.new_model` makes; left in evaluation mode.
    examples : sequence of Example
        At least one.
    head : Head
        Margin and targets.
    layout : Layout
        How examples are laid out in forward passes; results do not depend on it.
    batch_tokens : int
        Tokens of one forward pass, padding included; results do not depend on it.
    pad_id : int
        Token id of the padding.
    bfloat16 : bool, default=False
        Whether the forward computes in bfloat16.
    inner : bool, default=False
        Whether the calls inside turns count too, as in a training step. What measures a model
        (held-out loss, calibration) is of prefixes alone.

    Returns
    -------
    Predictions
        Every prefix of every example, in order, with the inner positions between them if asked
        for.
    """
    device = next(model.parameters()).device
    parts: dict[int, tuple[Array, Array, Array]] = {}
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for indices in layout.batches(examples, batch_tokens):
            rows = [examples[i] for i in indices]
            batch = layout.collate(
                rows, head.targets, pad_id=pad_id, inner=inner, written=head.is_log_ratio
            )
            with autocast(device, bfloat16):
                logits_PC = logits_at(model, to_device(batch, device))
            logits_PC = logits_PC.cpu().double()
            total += float(head.loss(logits_PC, batch))
            margins_P = head.margin(logits_PC)
            arrays = [t.double().numpy() for t in (margins_P, batch.targets_P, batch.weights_P)]
            rows_P = batch.rows_P.numpy()
            for row, index in enumerate(indices):
                z, y, w = (a[rows_P == row] for a in arrays)
                parts[index] = (z, y, w)
    columns = zip(*(parts[i] for i in range(len(examples))), strict=True)
    z_P, y_P, w_P = (np.concatenate(column) for column in columns)
    sizes = tuple(len(parts[i][0]) for i in range(len(examples)))
    loss = total / float(w_P.sum())
    return Predictions(margins_P=z_P, targets_P=y_P, weights_P=w_P, sizes=sizes, loss=loss)
