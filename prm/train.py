"""``prm train``: labels, or a public data set, to a reward model.

Rows are split by task, so no task is on both sides; the held-out part decides when to stop and
calibrates the scores. The output folder is an ordinary Hugging Face folder plus ``prm.json``; the
resumable state lies in its hidden ``.state`` until training is finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from rich.console import Console
from scipy.special import logit
from torch import nn
from transformers import PreTrainedTokenizerBase

from prm import calibrate
from prm.card import PublishConfig, push
from prm.checkpoint import (
    Metadata,
    Provenance,
    is_checkpoint,
    load_metadata,
    save_checkpoint,
    vocabulary_of,
)
from prm.data import Example, OnLong, keep_short, make_examples
from prm.fit import FitOptions, Fitter
from prm.heads import Head, get_head
from prm.implicit import plain_network
from prm.layout import LAYOUTS
from prm.model import (
    Device,
    add_lora,
    context_length,
    merge_lora,
    new_model,
    num_trainable,
    open_config,
    open_tokenizer,
    pick_device,
)
from prm.predict import Predictions, predict
from prm.recipe import RecipeConfig
from prm.rendering import Position
from prm.schedule import default_learning_rate, default_step_tokens
from prm.split import Split, split_by_task
from prm.training_data import PublicData, load_rows, provenance_of, shuffle_labels, why_unusable
from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.run import config_dict, open_run
from trajectory.tracking import make_tracker

STATE = ".state"
"""Hidden folder of an unfinished run; hidden, so that it is no part of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a process reward model from labels."""

    labels: Path | None = None
    """Folder that `prm label` wrote; or give --data."""
    public: PublicData = field(default_factory=PublicData)
    model: str
    """Base: hub id or folder of a causal language model or an encoder."""
    out: Path
    """Folder of the checkpoint; an interrupted run continues in it."""
    head: str = "value"
    """What to predict: value (from rollout counts), binary, token, token:WRONG,RIGHT (begins with
    the base's own rows of two words), ranking (all three from labels), implicit or implicit:BETA
    (how much likelier a trained language model makes the actions than the base; from counts)."""
    position: Position = "observation"
    """Score a step after its observation, or right after its action."""
    lora_rank: int = 0
    """Rank of LoRA adapters, merged into the checkpoint; 0 trains all weights."""
    epochs: int = 6
    """Most passes over the labels."""
    learning_rate: float | None = None
    """Peak rate; None chooses by model size and prints it."""
    step_tokens: int | None = None
    """Tokens of one optimizer step; None takes about 32 steps an epoch, of 2048 to 16384 tokens."""
    batch_tokens: int = 8192
    """Padded tokens of one forward pass; lower it if memory runs out, results do not change."""
    max_length: int = 4096
    """Longest trajectory in tokens; also bounded by the model's own limit."""
    on_long: OnLong = "error"
    """What to do with longer trajectories: stop, or drop and count them. They are never cut."""
    held_out: float = 0.15
    """Share of the tasks held out for early stopping and calibration."""
    patience: int = 2
    """Epochs without a lower held-out loss before stopping; 0 never stops early."""
    seed: int = 0
    device: Device = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes; auto is float32 on CPU and bfloat16 on GPU. Trained weights are float32,
    those that LoRA leaves alone have the format of the passes."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        if get_head(self.head).is_log_ratio and self.recipe.head_first:
            raise InputError(
                f"--head-first: head {self.head!r} has no classification layer that could be "
                "trained first: leave it out"
            )
        if (self.labels is None) == (self.public.data is None):
            raise InputError(
                "give exactly one of --labels (a folder of `prm label`) and --data FORMAT:PATH"
            )
        for name in ("epochs", "step_tokens", "batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if self.lora_rank < 0 or self.patience < 0:
            raise InputError("--lora-rank and --patience must not be negative")
        if not 0 < self.held_out < 1:
            raise InputError("--held-out must lie between 0 and 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError("--learning-rate must be positive")

    @property
    def source(self) -> str:
        """Where the rows come from, as it was given."""
        return str(self.labels) if self.public.data is None else self.public.data


def train(config: TrainConfig) -> Path:
    """Train a reward model and write its folder.

    Returns
    -------
    Path
        ``config.out``.

    Raises
    ------
    InputError
        If labels or base are unusable, the folder belongs to another run, or the numbers broke
        down (the best checkpoint so far is then kept).
    """
    config.publish.check_token()
    loaded = load_rows(config.labels, config.public)
    rows = loaded.rows
    accelerator = Accelerator(cpu=pick_device(config.device).type == "cpu")
    if not accelerator.is_main_process:  # the main process alone owns the folder
        accelerator.wait_for_everyone()
        _train(config, rows, accelerator, {})
        return config.out
    parents = [loaded.path, Path(config.model)]
    recorded = config_dict(_unpublished(config))
    with open_run(config.out, kind="train", config=recorded, parents=parents) as run:
        accelerator.wait_for_everyone()
        if not is_checkpoint(config.out) or (config.out / STATE).exists():
            _train(config, rows, accelerator, {p.path: p.sha256 for p in run.manifest.parents})
        training = load_metadata(config.out).training
        counted = ("train_", "held_out_", "dropped_", "epochs", "steps")
        run.finish(
            {k: n for k, n in training.items() if isinstance(n, int) and k.startswith(counted)}
        )
    if config.publish.push_to_hub is not None:
        address = push(config.out, config.publish.push_to_hub)
        Console(stderr=True, highlight=False).print(f"pushed to {address}", soft_wrap=True)
    return config.out


def _unpublished(config: TrainConfig) -> TrainConfig:
    """Return the settings that decide what is trained; a finished model can be pushed later."""
    return replace(config, publish=replace(config.publish, push_to_hub=None))


def _train(
    config: TrainConfig,
    rows: Sequence[LabelledTrajectory],
    accelerator: Accelerator,
    parents: Mapping[str, str],
) -> None:
    """Prepare, fit, calibrate and save."""
    head = get_head(config.head)
    tokenizer = open_tokenizer(config.model)
    split = prepare(config, rows, tokenizer, head)
    base_rate = _base_rate(split.train, head)

    def fresh() -> nn.Module:
        model = new_model(config.model, head, base_rate=base_rate, seed=config.seed)
        if not config.lora_rank:
            return model
        return add_lora(model, rank=config.lora_rank, seed=config.seed)

    model = fresh()
    LAYOUTS[config.recipe.packing].check(plain_network(model), vocabulary=len(tokenizer))
    options = _fit_options(config, model, split, tokenizer.pad_token_id)
    # FSDP shards weights of one number format only. A reference keeps the format of its policy.
    is_fsdp = accelerator.distributed_type is DistributedType.FSDP
    if options.bfloat16 and config.lora_rank and not is_fsdp:
        _halve_frozen(model)
    fitter = Fitter(
        model, head, options=options, folder=config.out / STATE, accelerator=accelerator
    )
    _announce(split, fitter, base_rate=base_rate, options=options)
    tracker = make_tracker(
        config.publish.track if accelerator.is_main_process else "none",
        out=config.out,
        name=config.out.name,
        config=config_dict(_unpublished(config)),
    )
    try:
        done = fitter.fit(split.train, split.held_out, tracker)
    finally:
        tracker.close()
    whole = fitter.whole_model(fresh)
    if accelerator.is_main_process and done.best_epoch:
        provenance = provenance_of(rows, config.public, source=config.source, parents=parents)
        _save(config, fitter, whole, split, provenance=provenance, base_rate=base_rate)
    accelerator.wait_for_everyone()
    if done.diverged is not None:
        kept = (
            f"epoch {done.best_epoch} is kept in {config.out}" if done.best_epoch else "none kept"
        )
        raise InputError(
            f"training broke down ({done.diverged}); checkpoint: {kept}; look at the "
            "rows if only some are named, or train again in another folder with a --learning-rate "
            f"below {options.learning_rate:.2g}"
        )


def _halve_frozen(model: nn.Module) -> None:
    """Hold what is not trained in bfloat16, the format forward passes use anyway."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def prepare(
    config: TrainConfig,
    rows: Sequence[LabelledTrajectory],
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
) -> Split:
    """Render the rows, leave out what cannot be used, and split by task.

    Raises
    ------
    InputError
        If no row has a target, or there are fewer than two tasks.
    """
    examples = make_examples(rows, tokenizer, position=config.position)
    limit = min(config.max_length, context_length(open_config(config.model)) or config.max_length)
    short, dropped_long = keep_short(examples, max_length=limit, on_long=config.on_long)
    usable = [e for e in short if any(head.targets(e).weights)]
    if not usable:
        raise InputError(
            f"{config.source}: none of the {len(rows)} trajectories has a usable label for head "
            f"{head.name!r} ({dropped_long} were too long): {why_unusable(head, config.public)}"
        )
    if config.public.shuffle_labels:
        usable = shuffle_labels(usable, seed=config.seed)
    train, held_out = split_by_task(
        usable, share=config.held_out, seed=config.seed, source=config.source
    )
    return Split(
        train=train,
        held_out=held_out,
        dropped_long=dropped_long,
        dropped_unlabelled=len(short) - len(usable),
    )


def _base_rate(examples: Sequence[Example], head: Head) -> float:
    """Return the weighted mean target."""
    targets = [head.targets(e) for e in examples]
    values = np.concatenate([t.values for t in targets])
    return float(np.average(values, weights=np.concatenate([t.weights for t in targets])))


def _fit_options(config: TrainConfig, model: nn.Module, split: Split, pad_id: int) -> FitOptions:
    """Resolve what depends on model, data and device."""
    on_gpu = pick_device(config.device).type == "cuda"
    epoch_tokens = LAYOUTS[config.recipe.packing].tokens(split.train)
    rate = config.learning_rate
    if rate is None:
        rate = default_learning_rate(model, lora=config.lora_rank > 0)
    return FitOptions(
        epochs=config.epochs,
        learning_rate=rate,
        step_tokens=config.step_tokens or default_step_tokens(epoch_tokens),
        batch_tokens=config.batch_tokens,
        patience=config.patience,
        seed=config.seed,
        bfloat16=config.precision == "bfloat16" or (config.precision == "auto" and on_gpu),
        pad_id=pad_id,
        head_first=config.recipe.head_first,
        packing=config.recipe.packing,
    )


def _announce(split: Split, fitter: Fitter, *, base_rate: float, options: FitOptions) -> None:
    """Say what is about to be trained, choices made automatically included."""
    if not fitter.accelerator.is_main_process:
        return
    tasks = split.tasks()
    tokens = LAYOUTS[options.packing].tokens(split.train)
    _say(
        f"{len(split.train)} trajectories of {len(tasks.train)} tasks to train on, "
        f"{len(split.held_out)} of {len(tasks.validation)} held out "
        f"({split.dropped_long} dropped as too long, {split.dropped_unlabelled} without labels); "
        f"base rate {base_rate:.3f}; {num_trainable(fitter.raw_model):,} trainable parameters; "
        f"{tokens:,} tokens an epoch, {options.step_tokens} a step; "
        f"peak learning rate {options.learning_rate:.2g}"
    )


def _say(text: str) -> None:
    """Tell the user one line."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _save(
    config: TrainConfig,
    fitter: Fitter,
    whole: nn.Module,
    split: Split,
    *,
    provenance: Provenance,
    base_rate: float,
) -> None:
    """Merge, calibrate on the held-out part, write the folder and remove the resumable state."""
    model = merge_lora(whole.float())
    head, done, options = fitter.head, fitter.done, fitter.options
    held_out = predict(  # in float32, as scoring does
        model,
        split.held_out,
        head,
        layout=LAYOUTS[options.packing],
        batch_tokens=options.batch_tokens,
        pad_id=options.pad_id,
    )
    calibration = calibrate.fit(
        held_out.margins_P,
        held_out.targets_P,
        held_out.weights_P,
        method=config.recipe.calibration,
        groups=[e.task_id for e in split.held_out for _ in e.positions],
    )
    _say(calibrate.describe(calibration))
    tokenizer = open_tokenizer(config.model)
    metadata = Metadata(
        head=head.name,
        kind=head.kind,
        position=config.position,
        aggregation=head.aggregation,
        calibration=calibration,
        base_model=config.model,
        vocabulary=vocabulary_of(tokenizer),
        provenance=provenance,
        training=_training_facts(split, fitter, held_out, base_rate=base_rate),
    )
    save_checkpoint(
        config.out, model=model, tokenizer=tokenizer, metadata=metadata, tasks=split.tasks()
    )
    if done.diverged is None:
        shutil.rmtree(config.out / STATE)


def _training_facts(
    split: Split, fitter: Fitter, held_out: Predictions, *, base_rate: float
) -> dict[str, float | int | str | None]:
    """Gather what ``prm.json`` says of the training run."""
    done, options, tasks = fitter.done, fitter.options, split.tasks()
    constant = np.full_like(held_out.margins_P, logit(np.clip(base_rate, 1e-4, 1 - 1e-4)))
    return {
        "train_trajectories": len(split.train),
        "train_tasks": len(tasks.train),
        "held_out_trajectories": len(split.held_out),
        "held_out_tasks": len(tasks.validation),
        "held_out_positions": int((held_out.weights_P > 0).sum()),
        "dropped_long": split.dropped_long,
        "dropped_unlabelled": split.dropped_unlabelled,
        "epochs": done.epoch,
        "best_epoch": done.best_epoch,
        "steps": done.step,
        "learning_rate": options.learning_rate,
        "step_tokens": options.step_tokens,
        "base_rate": base_rate,
        "held_out_loss": held_out.loss,
        "held_out_nll": held_out.nll(),
        "base_rate_nll": replace(held_out, margins_P=constant).nll(),
    }
