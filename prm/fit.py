"""The optimisation loop: exact steps, early stopping on held-out loss, resumable state.

One optimizer step adds the summed losses of its batches and divides once by the step's total
weight (rollouts, or labelled positions), over all processes: the gradient does not depend on how
the step was cut into batches. Shuffles and dropout depend only on (seed, epoch) and the learning
rate only on the step number, so the state after an epoch is weights, optimizer and counters, and
a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from prm.data import Batch, Example
from prm.heads import Head
from prm.layout import LAYOUTS, Packing
from prm.model import autocast, logits_at, to_device
from prm.predict import Predictions, predict
from prm.schedule import learning_rate_at
from prm.sharded import cut_like, gather, gather_optimizer, is_sharded, load_optimizer
from prm.stages import body_parameters, broken_rows
from trajectory.atomic import atomic_path
from trajectory.progress import progress
from trajectory.seeds import derive_seed

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01


class Log(Protocol):
    """Where curves go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at an optimizer step."""
        ...


class Bar(Protocol):
    """What shows how far training is."""

    def advance(self, n: int = 1, **fields: str | int | float) -> None:
        """Count steps."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """How to train."""

    epochs: int
    """Passes over the rows with all free parameters."""
    learning_rate: float
    step_tokens: int
    """Real tokens of one optimizer step."""
    batch_tokens: int
    """Padded tokens of one forward pass."""
    patience: int
    """Epochs without a better held-out loss before stopping."""
    seed: int
    bfloat16: bool
    """Whether forwards run in bfloat16; weights and losses stay float32."""
    pad_id: int
    head_first: int = 0
    """Passes before those, with the classification layer alone."""
    packing: Packing = "none"
    """How rows are laid out in forward passes."""


@dataclass(kw_only=True, slots=True)
class Progressed:
    """Counters of a training run, after some epoch."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps taken."""
    best_epoch: int = 0
    """Epoch of the kept weights, from 1; 0 if none."""
    best_loss: float = math.inf
    """Its held-out loss per unit of weight, nats."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per epoch: training and held-out loss."""
    diverged: str | None = None
    """Why training stopped early, if numbers broke down."""


class Fitter:
    """Trains a model's free parameters and leaves it with the best weights.

    Parameters
    ----------
    model : Module
        On the CPU; moved and wrapped by accelerate.
    head : Head
        Targets and loss.
    options : FitOptions
        How to train.
    folder : Path
        Where the state lives.
    accelerator : Accelerator
        Devices and processes.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        *,
        options: FitOptions,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.head, self.options, self.accelerator = head, options, accelerator
        self._layout = LAYOUTS[options.packing]
        self._latest, self._best = folder / "latest.pt", folder / "best.pt"
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": WEIGHT_DECAY},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._body = body_parameters(self.raw_model)
        self._sharded = is_sharded(self.raw_model)
        self.done = Progressed()
        if self._latest.is_file():
            self._restore()

    @property
    def raw_model(self) -> nn.Module:
        """The model without accelerate's wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    def whole_model(self, fresh: Callable[[], nn.Module]) -> nn.Module:
        """Return the model unwrapped; its trained weights in a fresh copy where FSDP shards them.

        All processes call it, since gathering weights needs them all.
        """
        if not self._sharded:
            return self.raw_model
        weights, model = self._weights(), fresh()
        model.load_state_dict(weights, strict=False)  # what is frozen is as in any fresh copy
        return model

    def fit(self, train: Sequence[Example], held_out: Sequence[Example], log: Log) -> Progressed:
        """Train until the epochs are used up, the loss stops improving, or numbers break.

        Returns
        -------
        Progressed
            The model then holds the weights of ``best_epoch``, or its initial ones where no epoch
            was ever finished.
        """
        epochs = self.options.head_first + self.options.epochs
        plans = [self._plan(train, epoch) for epoch in range(epochs)]
        sizes = [len(plan) for plan in plans]
        with self._progress(sum(sizes)) as bar:
            for epoch in range(self.done.epoch, epochs):
                if self._out_of_patience():
                    break
                last = self._run_epoch(train, plans[epoch], sizes=sizes, log=log, bar=bar)
                if self.done.diverged is not None:
                    break
                self._finish_epoch(last, held_out, log)
        if self.done.best_epoch:
            self._load_weights(torch.load(self._best, weights_only=True))
        self.accelerator.wait_for_everyone()
        return self.done

    def _progress(self, total: int) -> AbstractContextManager[Bar]:
        """Show progress once, not once per process."""
        if self.accelerator.is_main_process:
            return progress("train", total, done=self.done.step)
        return nullcontext(_Silent())

    def _plan(self, train: Sequence[Example], epoch: int) -> list[list[list[int]]]:
        """Lay out an epoch."""
        return self._layout.plan(
            train,
            step_tokens=self.options.step_tokens,
            batch_tokens=self.options.batch_tokens,
            seed=derive_seed(self.options.seed, epoch),
        )

    def _out_of_patience(self) -> bool:
        """Tell whether the loss has not improved for long enough."""
        begin = max(self.done.best_epoch, self.options.head_first)
        return self.done.epoch - begin >= self.options.patience > 0

    @property
    def _head_only(self) -> bool:
        """Whether the present epoch trains the classification layer alone."""
        return self.done.epoch < self.options.head_first

    def _rate(self, sizes: Sequence[int]) -> float:
        """Return the learning rate of the next step; each stage warms up and decays by itself."""
        first = sum(sizes[: self.options.head_first])
        step, total = self.done.step, first
        if step >= first:
            step, total = step - first, sum(sizes) - first
        return learning_rate_at(step, total, self.options.learning_rate)

    def _run_epoch(
        self,
        train: Sequence[Example],
        plan: Sequence[list[list[int]]],
        *,
        sizes: Sequence[int],
        log: Log,
        bar: Bar,
    ) -> dict[str, float]:
        """Take all steps of an epoch and return the last one's metrics, not yet logged."""
        torch.manual_seed(derive_seed("dropout", self.options.seed, self.done.epoch))
        self.model.train()
        losses: list[float] = []
        metrics: dict[str, float] = {}
        for batches in plan:
            if metrics:
                log.log(self.done.step, metrics)
            rate = self._rate(sizes)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            examples = [[train[i] for i in indices] for indices in batches]
            loss, norm = self._step(examples)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                rows = [example for batch in examples for example in batch]
                self.done.diverged = (
                    f"loss {loss}, gradient norm {norm} at step {self.done.step}; "
                    f"{broken_rows(rows, self.predict(rows, inner=self.head.inner))}"
                )
                break
            self.done.step += 1
            losses.append(loss)
            metrics = {"train/loss": loss, "train/lr": rate, "train/grad_norm": norm}
            bar.advance(1, epoch=self.done.epoch + 1, loss=loss)
        return {**metrics, "train/epoch_loss": float(np.mean(losses or [math.nan]))}

    def _step(self, batches: Sequence[Sequence[Example]]) -> tuple[float, float]:
        """Take one optimizer step over batches of examples; returns its loss and gradient norm."""
        head, collate = self.head, self._layout.collate
        loss = self.accumulate(
            [
                collate(
                    b,
                    head.targets,
                    pad_id=self.options.pad_id,
                    inner=head.inner,
                    written=head.is_log_ratio,
                )
                for b in batches
            ]
        )
        if self._head_only:
            for parameter in self._body:  # without a gradient it takes no part in the step
                parameter.grad = None
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if math.isfinite(loss) and math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, float(norm)

    def accumulate(self, batches: Sequence[Batch]) -> float:
        """Add the gradient of one optimizer step; returns its loss.

        Notes
        -----
        ``loss = (sum over all batches of the summed loss) / (sum over all batches of weights)``.
        Processes take turns at the batches; one with a batch less repeats one with zero weights,
        so that all take part in the same number of collective operations.
        """
        accelerator = self.accelerator
        denominator = sum(float(b.weights_P.sum()) for b in batches)
        world, rank = accelerator.num_processes, accelerator.process_index
        mine = [b for i, b in enumerate(batches) if i % world == rank]
        rounds = math.ceil(len(batches) / world)
        if len(mine) < rounds:
            mine.append(_weightless(batches[0]))
        total = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(mine):
            with self._synced(last=index == rounds - 1):
                part = self._loss(to_device(batch, accelerator.device)) / denominator
                accelerator.backward(part * world)  # the wrapper averages over processes
            total += part.detach()
        return float(accelerator.reduce(total, reduction="sum"))

    def _synced(self, *, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes only after the last batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum the loss of one batch."""
        with autocast(self.accelerator.device, self.options.bfloat16):
            logits_PC = logits_at(self.model, batch)
        return self.head.loss(logits_PC, batch)

    def _finish_epoch(self, last: dict[str, float], held_out: Sequence[Example], log: Log) -> None:
        """Measure the held-out loss, keep the weights if best, and save the state."""
        predictions = self.predict(held_out)
        loss = predictions.loss
        if not math.isfinite(loss):
            self.done.diverged = (
                f"held-out loss {loss} after epoch {self.done.epoch + 1}; "
                f"{broken_rows(held_out, predictions)}"
            )
            return
        self.done.epoch += 1
        self.done.history.append(
            {
                "epoch": self.done.epoch,
                "train_loss": last["train/epoch_loss"],
                "held_out_loss": loss,
            }
        )
        better = loss < self.done.best_loss
        if better:
            self.done.best_epoch, self.done.best_loss = self.done.epoch, loss
        log.log(self.done.step, {**last, "held_out/loss": loss, "epoch": float(self.done.epoch)})
        self._save(better=better)

    def predict(self, examples: Sequence[Example], *, inner: bool = False) -> Predictions:
        """Say what the present weights predict of examples, of the calls inside turns if asked."""
        options = self.options
        return predict(
            self.model,
            examples,
            self.head,
            layout=self._layout,
            batch_tokens=options.batch_tokens,
            pad_id=options.pad_id,
            bfloat16=options.bfloat16,
            inner=inner,
        )

    def _save(self, *, better: bool) -> None:
        """Write the state; the best weights first, so that a state never points at missing ones."""
        main = self.accelerator.is_main_process
        if main or self._sharded:
            weights, optimizer = self._weights(), gather_optimizer(self.optimizer)
        if main:
            if better:
                _write(self._best, weights)
            state = {
                "progressed": asdict(self.done),
                "weights": weights,
                "optimizer": optimizer,
            }
            _write(self._latest, state)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Continue from the state an interrupted run left."""
        state = torch.load(self._latest, map_location="cpu", weights_only=True)
        self.done = Progressed(**state["progressed"])
        self._load_weights(state["weights"])
        load_optimizer(self.optimizer, state["optimizer"])

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters on the CPU."""
        named = self.raw_model.named_parameters()
        return {name: gather(p) for name, p in named if p.requires_grad}

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Put trained parameters back."""
        named = dict(self.raw_model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                named[name].copy_(cut_like(value, named[name]))


class _Silent:
    """Progress that nobody sees."""

    def advance(self, n: int = 1, **fields: str | int | float) -> None:
        """Do nothing."""


def _weightless(batch: Batch) -> Batch:
    """Copy a batch with every position masked."""
    return replace(batch, weights_P=torch.zeros_like(batch.weights_P))


def _write(path: Path, state: object) -> None:
    """Save tensors, replacing the file as a whole."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
