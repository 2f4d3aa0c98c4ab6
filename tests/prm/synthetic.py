"""A tiny base model and synthetic labels whose right values are known, for the tests of `prm`."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prm.data import Example
from prm.model import quiet_transformers
from prm.train import TrainConfig
from trajectory.records import (
    LabelledTrajectory,
    Observation,
    Sampling,
    Step,
    StepEvidence,
    StepLabels,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)
from trajectory.run import open_run
from trajectory.store import write_labels

SPECIAL = ("<|end|>", "<|bos|>")


def make_tokenizer(*, bos: bool = False, end: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    names = {"eos_token": "<|end|>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_base(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """Save a random causal language model with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,  # vLLM's CPU kernels need heads of 32
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_trajectory(
    marks: str, *, task: str = "t0", number: int = 0, outcome: float | None = None
) -> Trajectory:
    """A trajectory whose steps are right (``+``) or wrong (``-``), the last one the answer."""
    steps = [
        Step(
            text=f"I add {'right' if mark == '+' else 'wrong'}",
            calls=(ToolCall(name="calculator", arguments="{}"),),
            observations=(Observation(content="3" if mark == "+" else "7"),),
        )
        for mark in marks
    ]
    right = float("-" not in marks) if outcome is None else outcome
    return Trajectory(
        trajectory_id=f"{task}/{number}",
        task=Task(task_id=task, domain="test", prompt=f"add it up {task}", answer="3"),
        steps=(*steps, Step(text="The answer is here")),
        stop=StopReason.ANSWERED,
        answer="3",
        outcome=right,
    )


def make_turns(*turns: str, task: str = "t0", number: int = 0) -> Trajectory:
    """A cut-off trajectory whose turns make a right (``+``) or wrong (``-``) call each, or none."""
    steps = [
        Step(
            text=f"I make {len(turn)} calls",
            calls=tuple(
                ToolCall(name="calculator", arguments=f'{{"n": {n}}}') for n in range(len(turn))
            ),
            observations=tuple(Observation(content="3" if mark == "+" else "7") for mark in turn),
        )
        for turn in turns
    ]
    return Trajectory(
        trajectory_id=f"{task}/{number}",
        task=Task(task_id=task, domain="test", prompt=f"add it up {task}", answer="3"),
        steps=tuple(steps),
        stop=StopReason.MAX_STEPS,
    )


def make_example(*turns: tuple[int, int, int], name: str = "x") -> Example:
    """An example whose turns have k calls, n rollouts and c right answers, given as (k, n, c)."""
    positions, calls, end = [0], [], 0
    for k, _, _ in turns:
        calls.append(tuple(range(end + 2, end + 2 + 2 * k, 2)))
        end = calls[-1][-1] if k else end + 1
        positions.append(end)
    return Example(
        input_ids=tuple(i % 20 for i in range(end + 1)),
        positions=tuple(positions),
        rollouts=(6, *(n for _, n, _ in turns)),
        correct=(3, *(c for _, _, c in turns)),
        values=(0.5, *(c / n if n else None for _, n, c in turns)),
        task_id="t",
        trajectory_id=name,
        calls=tuple(calls),
    )


def label_row(
    trajectory: Trajectory, marks: str, *, rollouts: int = 8, seed: int = 0
) -> LabelledTrajectory:
    """Draw counts: a state without a wrong step succeeds with 0.9, any other with 0.1."""
    rng = random.Random(f"{seed}/{trajectory.trajectory_id}")
    task_rng = random.Random(f"{seed}/{trajectory.task.task_id}")
    correct = []
    for t in range(len(marks) + 1):
        p = 0.1 if "-" in marks[:t] else 0.9
        source = rng if t else task_rng  # the first state is shared by the task's trajectories
        correct.append(sum(source.random() < p for _ in range(rollouts)))
    counts = (*(rollouts for _ in correct), 0)
    values = (*(c / rollouts for c in correct), trajectory.outcome)
    zeros = (0,) * len(counts)
    return LabelledTrajectory(
        trajectory=trajectory,
        evidence=StepEvidence(
            trajectory_id=trajectory.trajectory_id,
            rollouts=counts,
            correct=(*correct, 0),
            truncated=zeros,
            failed=zeros,
            completer="synthetic",
            sampling=Sampling(),
            tokens=100,
        ),
        labels=StepLabels(
            trajectory_id=trajectory.trajectory_id,
            estimator="soft",
            values=values,
            low=values,
            high=values,
        ),
    )


def make_rows(
    num_tasks: int, *, per_task: int = 2, rollouts: int = 8, seed: int = 0, prefix: str = "t"
) -> list[LabelledTrajectory]:
    """Labelled trajectories of 1 to 3 tool steps each."""
    rng = random.Random(seed)
    rows = []
    for task in range(num_tasks):
        for number in range(per_task):
            marks = "".join(rng.choice("++-") for _ in range(rng.randint(1, 3)))
            trajectory = make_trajectory(marks, task=f"{prefix}{task}", number=number)
            rows.append(label_row(trajectory, marks, rollouts=rollouts, seed=seed))
    return rows


def write_label_folder(folder: Path, rows: list[LabelledTrajectory]) -> Path:
    """What `prm label` leaves: a parquet file and a manifest."""
    with open_run(folder, kind="label", config={}) as run:
        write_labels(folder / "labels.parquet", rows)
        run.finish({"trajectories": len(rows)})
    return folder


def small_config(base: Path, labels: Path, out: Path, **changes: object) -> TrainConfig:
    """A quick training run on the CPU."""
    config = TrainConfig(
        labels=labels,
        model=str(base),
        out=out,
        epochs=2,
        learning_rate=3e-3,
        step_tokens=1024,
        batch_tokens=2048,
        device="cpu",
    )
    return replace(config, **changes)  # type: ignore[arg-type]
