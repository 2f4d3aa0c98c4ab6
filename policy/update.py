"""Rows -> one optimizer step on the policy.

The gradient is summed over micro-batches with one denominator, so it is that of the whole batch
in one piece. Dropout stays off: the policy that is trained is the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from policy.batch import MicroBatch, TokenRow, collate, micro_batches
from policy.losses import LossStats, policy_loss
from prm.model import autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateOptions:
    """How one batch of rows changes the weights."""

    batch_tokens: int
    """Padded tokens in a micro-batch: bounds memory, does not change the result."""
    temperature: float
    """Of the sampling; logits are divided by it, as the sampler did."""
    pad_id: int
    epochs: int = 1
    """Optimizer steps on the same rows."""
    clip: tuple[float, float] = (0.2, 0.28)
    max_grad_norm: float = 1.0
    bfloat16: bool = False
    """Whether forward passes run in bfloat16; weights, gradients and the loss stay as they are."""


def action_logprobs(
    model: nn.Module, batch: MicroBatch, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy of every action token.

    Parameters
    ----------
    model : nn.Module
        A causal language model of ``transformers`` (or a PEFT wrapper of one).
    batch : MicroBatch
        At least one action token; none in the first column.
    temperature : float
        > 0.

    Returns
    -------
    logprobs_N : Tensor, shape (N,)
        Float32, with gradient; row by row in token order.
    entropy_N : Tensor, shape (N,)
        Nats, no gradient.
    """
    columns = batch.action_mask.any(dim=0).nonzero()
    first = int(columns[0])
    # Logits of the prompt that all rows share a column range of are never computed.
    keep = batch.input_ids.shape[1] - first + 1
    logits_BTV = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=keep,
    ).logits[:, :-1]
    mask_BT = batch.action_mask[:, first:]
    logits_NV = logits_BTV[mask_BT].float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    targets_N = batch.input_ids[:, first:][mask_BT]
    logprobs_N = -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return logprobs_N, _entropy(logits_NV)


@torch.no_grad()
def _entropy(logits_NV: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Return the entropy of each row, a chunk of rows at a time to bound memory."""
    parts = []
    for logits_CV in torch.split(logits_NV, chunk):
        logp_CV = torch.log_softmax(logits_CV, dim=-1)
        parts.append(-(logp_CV.exp() * logp_CV).sum(-1))
    return torch.cat(parts)


def update_policy(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[TokenRow],
    options: UpdateOptions,
) -> dict[str, float]:
    """Take ``options.epochs`` optimizer steps on the same rows.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its parameters without ``requires_grad`` stay.
    optimizer : Optimizer
        Its learning rate is the caller's business.
    rows : sequence of TokenRow
        The whole batch, at least one action token in every row.
    options : UpdateOptions

    Returns
    -------
    dict
        Loss, gradient norm before clipping (of the last epoch) and the means of `LossStats`.
    """
    device = next(model.parameters()).device
    batches = [
        collate(group, pad_id=options.pad_id).to(device)
        for group in micro_batches(rows, options.batch_tokens)
    ]
    denominator = sum(row.num_actions for row in rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    old_logprobs: list[torch.Tensor] = []
    stats, loss_sum, norm = LossStats(), 0.0, 0.0
    for epoch in range(options.epochs):
        stats, loss_sum = LossStats(), 0.0
        optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            with autocast(device, options.bfloat16):
                logprobs_N, entropy_N = action_logprobs(
                    model, batch, temperature=options.temperature
                )
            if epoch == 0:  # no weight has changed yet: these are the step's own starting point
                old_logprobs.append(logprobs_N.detach())
            loss, part = policy_loss(
                logprobs_N,
                batch.advantages[batch.action_mask],
                old_logprobs_N=old_logprobs[index],
                sampler_logprobs_N=batch.logprobs[batch.action_mask],
                denominator=denominator,
                clip=options.clip,
            )
            torch.autograd.backward(loss)
            loss_sum += float(loss.detach())
            stats += replace(part, entropy_sum=float(entropy_N.sum()))
        norm = float(nn.utils.clip_grad_norm_(parameters, options.max_grad_norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss_sum, "gradient_norm": norm, **stats.metrics()}
