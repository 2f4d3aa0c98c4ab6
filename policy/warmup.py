"""Supervised warm-up of a policy on demonstrations.

One optimizer step sums the loss over its micro-batches, of all processes, and divides by the
number of trained ids of the whole step, so the gradient does not depend on how the step was cut
up. The order of rows follows from seed and epoch alone; a run that was interrupted continues from
its last checkpoint and ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

from agent.chat import ChatFormat, ChatKind
from agent.tools import tool_schemas
from policy.tiny import make_model, make_tokenizer
from policy.warmup_data import (
    Batch,
    Row,
    assemble,
    collate,
    fitting,
    hold_out,
    micro_batches,
    plan_epoch,
    read_demonstrations,
    summed_loss,
    system_of,
)
from policy.warmup_state import CHECKPOINTS, interrupts, list_checkpoints, save_checkpoint
from prm.data import OnLong
from prm.model import autocast
from trajectory.atomic import atomic_folder
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import Trajectory
from trajectory.run import MANIFEST, config_dict, open_run, read_manifest
from trajectory.tracking import NoTracker, Tracker, TrackerKind, make_tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY = "tiny"
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Supervised fine-tuning on demonstrations."""

    data: Path
    """Folder of `policy synthesize`, or a trajectories .jsonl file."""
    model: str
    """tiny (the embedded policy, from scratch), a hub id or a folder."""
    out: Path
    """Folder for the policy: an ordinary Hugging Face folder."""
    epochs: int = 5
    """Passes over the data."""
    learning_rate: float | None = None
    """Peak rate of AdamW; default 3e-3 for tiny, 2e-4 with LoRA, else 2e-5."""
    warmup_share: float = 0.1
    """Share of the steps over which the rate rises from 0; it then falls as a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    step_tokens: int = 2048
    """Tokens of an optimizer step, all processes together."""
    batch_tokens: int = 4096
    """Padded tokens of one forward pass; lower it if memory runs out, results do not change."""
    max_length: int = 2048
    """Longest trajectory, tokens; none is ever cut."""
    on_long: OnLong = "error"
    """What to do with longer trajectories: stop, or drop and count them."""
    held_out: float = 0.02
    """Share of the tasks kept for the held-out loss."""
    lora_rank: int = 0
    """Rank of LoRA adapters, merged into the policy; 0 trains all weights."""
    chat_format: ChatKind = "auto"
    """The tokenizer's own template, or the built-in chatml; the result carries the one used."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the accelerator if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes; auto is float32 on CPU and bfloat16 on GPU. Weights stay float32."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""
    seed: int = 0
    """Fixes initial weights, held-out tasks and order."""
    track: TrackerKind = "none"
    """Where curves go."""

    def __post_init__(self) -> None:
        for name in ("epochs", "step_tokens", "batch_tokens", "max_length", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1")
        if self.lora_rank < 0:
            raise InputError("--lora-rank must be >= 0")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"--learning-rate must be > 0, not {self.learning_rate}")
        for name in ("warmup_share", "held_out", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be in [0, 1)")
        if self.model == TINY and self.lora_rank:
            raise InputError("--lora-rank needs a pretrained --model: tiny starts from scratch")
        if self.model == TINY and self.chat_format != "auto":
            raise InputError("--chat-format is for pretrained models: tiny brings its own")

    @property
    def peak_rate(self) -> float:
        """The learning rate, or the default for the kind of model."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.model == TINY:
            return 3e-3
        return 2e-4 if self.lora_rank else 2e-5


@dataclass(kw_only=True)
class _Training:
    """What the loop works on."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    plan: list[list[int]]
    """Row indices of every optimizer step of the whole run."""
    epoch_ends: frozenset[int]
    """Step counts after which an epoch is over."""
    train: Sequence[Row]
    held_out: Sequence[Row]
    pad_id: int
    bfloat16: bool
    """Whether forward passes run in bfloat16."""
    done: int = 0
    """Optimizer steps taken."""


def warmup(config: WarmupConfig) -> Path:
    """Fine-tune a policy on demonstrations and save it as a Hugging Face folder.

    Returns
    -------
    Path
        ``config.out``: config, weights (in the precision the model was published in) and
        tokenizer with the chat template used.

    Raises
    ------
    InputError
        If data or model are missing or unfit, or a trajectory is too long.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    trajectories = read_demonstrations(config.data)
    judged = [t for t in trajectories if t.stop.judged]
    chat = _chat(config, judged)
    rows = [assemble(chat, system_of(t), t) for t in judged]
    kept = fitting(rows, config.max_length, on_long=config.on_long)
    train, held_out = hold_out(kept, config.held_out, config.seed)
    if not accelerator.is_main_process:
        training = _prepare(config, accelerator, chat.tokenizer, train=train, held_out=held_out)
        _run(config, training, NoTracker())
        accelerator.get_state_dict(training.model)
        return config.out
    earlier = read_manifest(config.out) if (config.out / MANIFEST).exists() else None
    with open_run(
        config.out, kind="warmup", config=config_dict(config), parents=[config.data]
    ) as run:
        if earlier is not None and earlier.status == "finished":
            run.finish(earlier.counts)
            return config.out
        training = _prepare(config, accelerator, chat.tokenizer, train=train, held_out=held_out)
        with closing(_tracker(config)) as tracker:
            _run(config, training, tracker)
        _publish(config, training, chat)
        run.finish(
            {
                "trajectories": len(trajectories),
                "dropped_unjudged": len(trajectories) - len(judged),
                "dropped_long": len(rows) - len(kept),
                "held_out": len(held_out),
                "steps": training.done,
            }
        )
    return config.out


def _chat(config: WarmupConfig, trajectories: Sequence[Trajectory]) -> ChatFormat:
    """Make the chat format of the model with the tools of the demonstrations."""
    offered = {t.tools for t in trajectories}
    if len(offered) > 1:
        raise InputError(
            f"the trajectories of {config.data} were made with different tools {sorted(offered)}: "
            "a policy is warmed up for one set; split the file"
        )
    tools = tool_schemas(offered.pop())
    if config.model == TINY:
        return ChatFormat(make_tokenizer(), tools)
    return ChatFormat.load(config.model, tools=tools, kind=config.chat_format)


def _load_model(
    config: WarmupConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> torch.nn.Module:
    """Make the tiny model or load a pretrained one, with adapters if asked for."""
    if config.model == TINY:
        return make_model(tokenizer, seed=config.seed)
    rank = config.lora_rank
    # Full fine-tuning needs float32 weights (small updates are lost in bfloat16); frozen ones
    # under adapters do not.
    dtype = torch.bfloat16 if rank and device.type == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no model could be loaded from {config.model!r}: {reason}") from error
    if not rank:
        return cast("torch.nn.Module", model)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return cast("torch.nn.Module", get_peft_model(model, adapters))


def _prepare(
    config: WarmupConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Sequence[Row],
    held_out: Sequence[Row],
) -> _Training:
    """Set everything up and go to the last checkpoint, if there is one."""
    model = _load_model(config, tokenizer, accelerator.device)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.peak_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )
    lengths = [len(row.input_ids) for row in train]
    plan: list[list[int]] = []
    ends = []
    for epoch in range(config.epochs):
        plan += plan_epoch(lengths, config.step_tokens, seed=config.seed, epoch=epoch)
        ends.append(len(plan))
    schedule = get_cosine_schedule_with_warmup(
        optimizer, max(1, round(config.warmup_share * len(plan))), len(plan)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    training = _Training(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        epoch_ends=frozenset(ends),
        train=train,
        held_out=held_out,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        bfloat16=config.precision == "bfloat16"
        or (config.precision == "auto" and accelerator.device.type == "cuda"),
    )
    saved = list_checkpoints(config.out)
    if saved:
        training.done, folder = saved[-1]
        accelerator.load_state(str(folder))
    return training


def _tracker(config: WarmupConfig) -> Tracker:
    """Open the tracker of the run."""
    settings = config_dict(config)
    return make_tracker(config.track, out=config.out, name=config.out.name, config=settings)


def _run(config: WarmupConfig, training: _Training, tracker: Tracker) -> None:
    """Train to the end of the plan."""
    total = len(training.plan)
    with progress("warm-up steps", total, done=training.done) as bar, interrupts() as pending:
        for indices in training.plan[training.done :]:
            started = time.monotonic()
            rows = [training.train[i] for i in indices]
            loss = _step(training, rows, config.batch_tokens)
            training.done += 1
            speed = sum(len(row.input_ids) for row in rows) / (time.monotonic() - started)
            rate = float(training.schedule.get_last_lr()[0])
            metrics = {"loss": loss, "learning_rate": rate, "tokens_per_s": speed}
            bar.advance(loss=loss, tokens_per_s=round(speed))
            if training.done in training.epoch_ends and training.held_out:
                metrics["held_out_loss"] = _held_out_loss(training, config.batch_tokens)
                bar.advance(0, held_out=metrics["held_out_loss"])
            tracker.log(training.done, metrics)
            if (training.done % config.checkpoint_every == 0 or pending) and training.done < total:
                save_checkpoint(config.out, training.accelerator, step=training.done)
            if pending:
                raise KeyboardInterrupt


def _step(training: _Training, rows: Sequence[Row], batch_tokens: int) -> float:
    """Take one optimizer step and return the loss per trained id, nats."""
    accelerator, model = training.accelerator, training.model
    device = accelerator.device
    model.train()
    lengths = [len(row.input_ids) for row in rows]
    micros = micro_batches(range(len(rows)), lengths, batch_tokens)
    num_trained = sum(row.num_trained for row in rows)
    world, total = accelerator.num_processes, torch.zeros((), device=device)
    # Every process runs equally many micro-batches, or their gradient exchange would never meet.
    turns = math.ceil(len(micros) / world)
    for turn in range(turns):
        place = turn * world + accelerator.process_index
        weight = 1.0 if place < len(micros) else 0.0
        chosen = micros[min(place, len(micros) - 1)]
        batch = _on(device, collate([rows[i] for i in chosen], training.pad_id))
        last = turn == turns - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with autocast(device, training.bfloat16):
                loss = weight * summed_loss(model, batch) / num_trained
            accelerator.backward(loss * world)  # processes average their gradients
        total += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad()
    return float(accelerator.reduce(total, "sum"))


def _held_out_loss(training: _Training, batch_tokens: int) -> float:
    """Return the loss per trained id over the held-out rows, nats."""
    rows = training.held_out
    lengths = [len(row.input_ids) for row in rows]
    total = 0.0
    training.model.eval()
    device = training.accelerator.device
    with torch.no_grad(), autocast(device, training.bfloat16):
        for chosen in micro_batches(range(len(rows)), lengths, batch_tokens):
            batch = collate([rows[i] for i in chosen], training.pad_id)
            total += float(summed_loss(training.model, _on(device, batch)))
    return total / sum(row.num_trained for row in rows)


def _on(device: torch.device, batch: Batch) -> Batch:
    """Move a batch to the device."""
    return Batch(input_ids_BT=batch.input_ids_BT.to(device), labels_BT=batch.labels_BT.to(device))


def _publish(config: WarmupConfig, training: _Training, chat: ChatFormat) -> None:
    """Write the policy into the run folder, the weights last, and drop the checkpoints."""
    accelerator = training.accelerator
    gathered = accelerator.get_state_dict(training.model)
    model = accelerator.unwrap_model(training.model)
    if config.lora_rank:
        model = model.merge_and_unload()
    dtype = torch.float32
    if config.model != TINY:
        dtype = AutoConfig.from_pretrained(config.model).dtype or dtype
    model = model.to(dtype)
    state = None  # what the model itself holds, unless that is only this process's shard
    if accelerator.distributed_type is DistributedType.FSDP:
        state = {name: tensor.to(dtype) for name, tensor in gathered.items()}
    model.generation_config.eos_token_id = list(chat.stop_ids)
    staged = config.out / ".policy"
    with atomic_folder(staged) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        chat.tokenizer.save_pretrained(temporary)
    names = sorted(path.name for path in staged.iterdir())
    for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
        os.replace(staged / name, config.out / name)
    staged.rmdir()
    shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
