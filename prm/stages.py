"""The stage that trains the head alone, and what to say of rows that break the numbers.

With ``--head-first N`` the first N epochs train the classification layer only, so that its first,
arbitrary gradients do not distort the body (Kumar et al., arXiv:2202.10054). Each of the two
stages has its own warm-up and decay of the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from prm.data import Example
from prm.predict import Predictions

_HEAD_NAMES = frozenset({"score", "classifier"})
_SHOWN = 5


def is_head(name: str) -> bool:
    """Tell whether a parameter belongs to the classification layer, with LoRA's wrapper or not.

    Examples
    --------
    >>> is_head("score.weight"), is_head("model.layers.0.mlp.up_proj.weight")
    (True, False)
    >>> is_head("base_model.model.classifier.modules_to_save.default.bias")
    True
    """
    return not _HEAD_NAMES.isdisjoint(name.split("."))


def body_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trained parameters below the classification layer."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not is_head(name)]


def broken_rows(examples: Sequence[Example], predictions: Predictions) -> str:
    """Name the rows whose own predictions are not finite, or say that there are none such.

    Parameters
    ----------
    examples : sequence of Example
        The rows of an optimizer step, or of the held-out part.
    predictions : Predictions
        What the present weights say of them, in the same order.
    """
    ends = np.cumsum(predictions.sizes)[:-1]
    parts = np.split(predictions.margins_P, ends)
    bad = [e for e, z in zip(examples, parts, strict=True) if not np.isfinite(z).all()]
    if not bad:
        return f"each of the rows {_named(examples)} has finite scores by itself"
    if len(bad) == len(examples):
        return f"no row has finite scores ({_named(bad)})"
    return f"rows without finite scores: {_named(bad)}"


def _named(examples: Sequence[Example]) -> str:
    """List trajectory ids, the first few."""
    names = ", ".join(e.trajectory_id for e in examples[:_SHOWN])
    rest = len(examples) - _SHOWN
    return f"{names} and {rest} more" if rest > 0 else names
