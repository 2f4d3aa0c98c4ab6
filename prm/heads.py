"""Heads: what a reward model predicts at a position, from which target, with which loss.

Adding a head is one function here (or in `prm.losses`) and one row in `HEADS`. Every head but
``implicit`` is a token classifier with at most two classes, so that a checkpoint is an ordinary
``*ForTokenClassification`` folder and a pooling server gives the same numbers: one class is read
through a sigmoid, two through a softmax, and both equal the sigmoid of the head's *margin*, the
log-odds on which calibration works too.

The heads:

- ``value``: log-odds of eventual success, by the binomial likelihood of the rollout counts.
- ``binary``: a fresh two-class layer, cross-entropy against the labels.
- ``token``: the same loss, but the layer begins as two rows of the base's own language-model head:
  those of a word for *wrong* and one for *right*, ``-`` and ``+`` as in Math-Shepherd
  (arXiv:2312.08935). The initial scores are the base's own probabilities of these words, so a base
  that was taught or prompted to judge keeps that. Only two rows are kept, because a softmax over
  them is the same as the base's probabilities renormalised over the two words; that keeps the
  checkpoint a plain token classifier, which loads and serves like every other.
- ``ranking``: steps of one trajectory compared with each other (PQM, arXiv:2410.11287). Its scores
  are no log-odds before calibration. The calls inside a turn are no targets of it: they have the
  turn's label, and comparing them with the turn's end would demand that a good turn's score rises
  with every call.
- ``implicit``: no layer at all, but how much likelier training has made the actions
  (ImplicitPRM, arXiv:2412.01981; PRIME, arXiv:2502.01456): the log-odds are a constant plus beta
  times the log-ratio of a trained language model to the base, summed over the tokens that the agent
  wrote (`prm.implicit`). The papers know the outcome of whole responses and train its cross-entropy
  at the end. That is one rollout at the last prefix, so the ``value`` head's likelihood of counts
  generalises it to any prefix that was measured, and equals it where only the outcome is known.
  The score of the task alone is the base rate for every task, and an observation moves no score:
  its meaning shows from the next action on. Both scoring positions give the same scores.

Dimension letters beside the project's own: P scored positions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from prm.data import Batch, Example, Targets
from prm.losses import binomial_nll, ranking_loss, soft_cross_entropy
from trajectory.errors import InputError

Kind = Literal["value", "correctness"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """One way to score a prefix."""

    name: str
    """Row of the table."""
    kind: Kind
    """``value`` (probability of eventual success) or ``correctness`` (of the step itself)."""
    classes: tuple[str, ...]
    """Class names, in logit order."""
    aggregation: str
    """Default aggregation of a trajectory's scores: ``last`` for values, ``min`` for correctness
    (arXiv:2501.07301, section 4)."""
    targets: Callable[[Example], Targets]
    """Targets of every prefix 0..S with weights; weight 0 masks a prefix."""
    loss: Callable[[torch.Tensor, Batch], torch.Tensor]
    """Logits of shape (P, C) and their batch to the summed loss; its denominator is the sum of the
    batch's weights."""
    margin: Callable[[torch.Tensor], torch.Tensor]
    """Logits of shape (..., C) to log-odds of shape (...)."""
    inner: bool = True
    """Whether the calls inside a turn are trained too, towards the turn's own targets; see
    `prm.data`."""
    words: bool = False
    """Whether the classes are words of the base, whose rows of its language-model head the
    classification layer begins with; else it begins at the base rate."""
    beta: float | None = None
    """Weight of the log-ratio of two language models; None for a head with a classification
    layer."""

    @property
    def is_log_ratio(self) -> bool:
        """Whether the network is a pair of language models, which need to know who wrote what."""
        return self.beta is not None


def value_targets(example: Example) -> Targets:
    """Return ``c / n`` with weight ``n`` for every prefix; prefixes without rollouts weigh 0."""
    pairs = zip(example.correct, example.rollouts, strict=True)
    values = tuple(c / n if n else 0.0 for c, n in pairs)
    return Targets(values=values, weights=tuple(float(n) for n in example.rollouts))


def label_targets(example: Example) -> Targets:
    """Return the estimator's label with weight 1 for every prefix; unknown labels weigh 0."""
    values = tuple(0.0 if v is None else v for v in example.values)
    weights = tuple(0.0 if v is None else 1.0 for v in example.values)
    return Targets(values=values, weights=weights)


def _value_loss(logits_PC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Binomial likelihood: targets are c/n, weights n."""
    correct_P = batch.targets_P * batch.weights_P
    return binomial_nll(logits_PC[:, 0], correct_P=correct_P, rollouts_P=batch.weights_P)


def _pair_loss(logits_PC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy against soft targets."""
    return soft_cross_entropy(logits_PC, targets_P=batch.targets_P, weights_P=batch.weights_P)


def _ranking_loss(logits_PC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Compare the steps of each trajectory."""
    return ranking_loss(
        logits_PC[:, 0],
        targets_P=batch.targets_P,
        weights_P=batch.weights_P,
        rows_P=batch.rows_P,
    )


def _single_margin(logits: torch.Tensor) -> torch.Tensor:
    """One class: the logit itself."""
    return logits[..., 0]


def _pair_margin(logits: torch.Tensor) -> torch.Tensor:
    """Two classes: right minus wrong."""
    return logits[..., 1] - logits[..., 0]


HEADS: dict[str, Head] = {
    "value": Head(
        name="value",
        kind="value",
        classes=("value",),
        aggregation="last",
        targets=value_targets,
        loss=_value_loss,
        margin=_single_margin,
    ),
    "binary": Head(
        name="binary",
        kind="correctness",
        classes=("wrong", "right"),
        aggregation="min",
        targets=label_targets,
        loss=_pair_loss,
        margin=_pair_margin,
    ),
    "token": Head(
        name="token",
        kind="correctness",
        classes=("-", "+"),
        aggregation="min",
        targets=label_targets,
        loss=_pair_loss,
        margin=_pair_margin,
        words=True,
    ),
    "ranking": Head(
        name="ranking",
        kind="correctness",
        classes=("rank",),
        aggregation="min",
        targets=label_targets,
        loss=_ranking_loss,
        margin=_single_margin,
        inner=False,
    ),
    "implicit": Head(
        name="implicit",
        kind="value",
        classes=("value",),
        aggregation="last",
        targets=value_targets,
        loss=_value_loss,
        margin=_single_margin,
        beta=0.05,  # of both papers
        inner=False,  # what happens inside a turn after it was written moves no score
    ),
}


def get_head(name: str) -> Head:
    """Look a head up by name.

    ``token:WRONG,RIGHT`` is the token head with other words, ``implicit:BETA`` the implicit head
    with another weight.

    Raises
    ------
    InputError
        If there is no such head; the message lists the valid names.

    Examples
    --------
    >>> get_head("token").classes, get_head("token:no,yes").classes
    (('-', '+'), ('no', 'yes'))
    >>> get_head("implicit").beta, get_head("implicit:0.1").beta
    (0.05, 0.1)
    """
    kind, colon, setting = name.partition(":")
    if kind == "token" and colon:
        classes = tuple(setting.split(","))
        if len(set(classes)) != 2 or len(classes) != 2 or not all(classes):
            raise InputError(f"head {name!r}: give two different words, as in token:WRONG,RIGHT")
        return replace(HEADS["token"], name=name, classes=classes)
    if kind == "implicit" and colon:
        return replace(HEADS["implicit"], name=name, beta=_read_beta(name, setting))
    if name not in HEADS:
        raise InputError(f"unknown head {name!r}; heads: {', '.join(sorted(HEADS))}")
    return HEADS[name]


def _read_beta(name: str, setting: str) -> float:
    """Read the weight of the implicit head."""
    try:
        beta = float(setting)
    except ValueError:
        beta = math.nan
    if not 0 < beta < math.inf:
        raise InputError(f"head {name!r}: give a positive number, as in implicit:0.05")
    return beta
