"""One side of the training comparison, in a process of its own so that its peak memory is its own.

``python -m benchmarks.peer_training {ours,trl} JOB.json``. Both sides get the same token ids, the
same labels at the same positions, the same initial weights, the same rows in every optimizer step,
AdamW with the same constant rate, decay and clipping, in float32: the losses must agree step by
step, and only speed and memory may differ.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prm.data import Example, collate
from prm.heads import get_head
from prm.model import open_tokenizer, quiet_transformers
from prm.plan import group_by_length

Job = dict[str, Any]


def ours(job: Job) -> list[dict[str, float]]:
    """Train with `prm.fit`: each step's rows are grouped by length into batches."""
    from accelerate import Accelerator

    from prm.fit import MAX_GRAD_NORM, FitOptions, Fitter

    pad_id = open_tokenizer(job["model"]).pad_token_id
    assert isinstance(pad_id, int)
    options = FitOptions(
        epochs=1,
        learning_rate=job["learning_rate"],
        step_tokens=1,  # the steps are given
        batch_tokens=job["batch_tokens"],
        patience=0,
        seed=0,
        bfloat16=False,
        pad_id=pad_id,
    )
    head = get_head("binary")
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as state:
        fitter = Fitter(
            _model(job), head, options=options, folder=Path(state), accelerator=accelerator
        )
        fitter.model.train()
        steps = []
        for rows in _steps(job):
            examples = [_example(row) for row in rows]
            watch = _Watch()
            groups = group_by_length(
                range(len(rows)),
                [len(e.input_ids) for e in examples],
                batch_tokens=options.batch_tokens,
            )
            loss = fitter.accumulate(
                [collate([examples[i] for i in g], head.targets, pad_id=pad_id) for g in groups]
            )
            accelerator.clip_grad_norm_(fitter.model.parameters(), MAX_GRAD_NORM)
            fitter.optimizer.step()
            fitter.optimizer.zero_grad(set_to_none=True)
            steps.append({"loss": loss, **watch.read()})
    return steps


def trl(job: Job) -> list[dict[str, float]]:
    """Train with TRL's PRMTrainer; its collator pads a step's rows to the longest."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.prm import PRMConfig, PRMTrainer

    steps: list[dict[str, float]] = []

    class Meter(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the trainer's own
            self.watch = _Watch()

        def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            steps.append(self.watch.read())

    rows = [
        {"input_ids": row["input_ids"], "labels": _token_labels(row)}
        for step in _steps(job)
        for row in step
    ]
    with tempfile.TemporaryDirectory() as out:
        trainer = PRMTrainer(
            model=_model(job),
            processing_class=open_tokenizer(job["model"]),
            train_dataset=Dataset.from_list(rows),
            args=PRMConfig(
                output_dir=out,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=job["rows_per_step"],
                max_steps=len(rows) // job["rows_per_step"],
                learning_rate=job["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=1.0,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            callbacks=[Meter()],
        )
        trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return [{"loss": float(loss), **step} for loss, step in zip(losses, steps, strict=True)]


class _Watch:
    """Wall-clock and processor time since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both, seconds."""
        return {
            "seconds": time.perf_counter() - self._started[0],
            "cpu_seconds": time.process_time() - self._started[1],
        }


def _model(job: Job) -> torch.nn.Module:
    """Load the common initial weights."""
    from transformers import AutoModelForTokenClassification

    with quiet_transformers():
        model = AutoModelForTokenClassification.from_pretrained(job["model"], dtype=torch.float32)
    assert isinstance(model, torch.nn.Module)
    return model


def _steps(job: Job) -> list[list[Job]]:
    """Cut the rows into optimizer steps."""
    size = job["rows_per_step"]
    rows = job["rows"]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _example(row: Job) -> Example:
    """Make our training row: a label at every position."""
    nothing = (0,) * len(row["positions"])
    return Example(
        input_ids=tuple(row["input_ids"]),
        positions=tuple(row["positions"]),
        rollouts=nothing,
        correct=nothing,
        values=tuple(row["labels"]),
        task_id="",
        trajectory_id="",
    )


def _token_labels(row: Job) -> list[int]:
    """Make TRL's training row: a label at every token, -100 where there is none."""
    labels = [-100] * len(row["input_ids"])
    for position, label in zip(row["positions"], row["labels"], strict=True):
        labels[position] = int(label)
    return labels


def main() -> None:
    """Train and print the steps and the peak memory as one line of JSON."""
    side, path = sys.argv[1:]
    steps = {"ours": ours, "trl": trl}[side](json.loads(Path(path).read_text()))
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("RESULT " + json.dumps({"steps": steps, "peak_mb": peak_kb / 1024}))


if __name__ == "__main__":
    main()
