"""The model under training, the engine that samples from the same weights, and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from agent.engines.base import EngineOptions
from agent.engines.transformers import TransformersEngine
from trajectory.atomic import atomic_folder

SMALL = 10_000_000
"""Parameters below which a model counts as the embedded kind."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Learner:
    """One set of weights, seen by the sampler and by the optimizer."""

    model: PreTrainedModel
    engine: TransformersEngine
    """Generates from `model` itself: an update is seen by the next episode."""
    optimizer: torch.optim.Optimizer
    learning_rate: float
    """After warm-up."""
    adapter: Any = None
    """The PEFT model around `model` with LoRA, else None."""


def make_learner(
    options: EngineOptions, *, learning_rate: float | None, lora_rank: int, seed: int
) -> Learner:
    """Load a policy for training.

    Parameters
    ----------
    options : EngineOptions
        Policy, device and limits; the dtype is chosen here.
    learning_rate : float or None
        None chooses by size: 1e-4 below ten million parameters, else 2e-5 for LoRA and 2e-6 for
        all weights.
    lora_rank : int
        0 trains all weights, in float32 (an update of a bfloat16 weight is mostly rounded away);
        above 0 the base keeps the engine's own dtype and float32 adapters on all linear layers
        are trained.
    seed : int
        For adapter initialization.

    Returns
    -------
    Learner
        In evaluation mode: no dropout, so that the trained policy is the one that sampled.

    Raises
    ------
    InputError
        If the policy cannot be loaded or served.
    """
    set_seed(seed)
    dtype = "auto" if lora_rank else "float32"
    engine = TransformersEngine(replace(options, dtype=dtype))
    model, adapter = engine.model, None
    size = model.num_parameters()
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora_rank,
                lora_alpha=2 * lora_rank,
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
        )
    model.train(False)
    if learning_rate is None:
        learning_rate = 1e-4 if size < SMALL else 2e-5 if lora_rank else 2e-6
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Learner(
        model=model,
        engine=engine,
        optimizer=make_optimizer(parameters, learning_rate),
        learning_rate=learning_rate,
        adapter=adapter,
    )


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW without weight decay: pulling weights to zero is no part of the objective."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def set_learning_rate(learner: Learner, step: int, warmup_steps: int) -> float:
    """Set the rate of one step: linear over the first ``warmup_steps``, then constant."""
    rate = learner.learning_rate * min(1.0, (step + 1) / max(1, warmup_steps))
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    return rate


def save_policy(learner: Learner, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the policy as an ordinary Hugging Face folder, tokenizer and chat template included.

    Adapters are merged into the weights, so the learner cannot be trained further.
    """
    model = learner.model if learner.adapter is None else learner.adapter.merge_and_unload()
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
