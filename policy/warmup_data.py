"""Rows of supervised fine-tuning: exactly the ids an episode has, trained on the agent's turns.

A row is put together from the same pieces the episode loop uses (prompt ids, turn ids with their
end-of-turn token, observation ids), so the policy sees in training what it will see in acting, and
which ids are trained on is known by construction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agent.chat import ChatFormat
from policy.synthesize import SYSTEM, TRAJECTORIES
from prm.data import OnLong
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.seeds import derive_seed
from trajectory.store import read_jsonl

IGNORED = -100
"""Label of ids that are not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One trajectory as ids."""

    task_id: str
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Per id: whether the agent wrote it (end-of-turn included)."""

    @property
    def num_trained(self) -> int:
        """Ids the loss is taken over."""
        return sum(self.trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded rows."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The id at each trained place, `IGNORED` elsewhere (not shifted)."""


def read_demonstrations(data: Path) -> list[Trajectory]:
    """Read the demonstrations of a folder or file."""
    path = data / TRAJECTORIES if data.is_dir() else data
    trajectories = list(read_jsonl(path, Trajectory))
    if not any(t.stop.judged for t in trajectories):
        raise InputError(f"{path} holds no finished trajectory: there is nothing to learn from")
    return trajectories


def system_of(trajectory: Trajectory) -> str:
    """Return the system prompt the agent gets for the trajectory's task."""
    system = trajectory.meta.get(SYSTEM)
    if not isinstance(system, str):
        raise InputError(
            f"trajectory {trajectory.trajectory_id!r} does not record its system prompt: give the "
            "output of `policy synthesize`"
        )
    return system


def assemble(chat: ChatFormat, system: str, trajectory: Trajectory) -> Row:
    """Lay a trajectory out as ids.

    Parameters
    ----------
    chat : ChatFormat
        Of the model to be trained, with the trajectory's tools.
    system : str
        System prompt of the task's domain.
    trajectory : Trajectory
        Its texts are encoded; ids sampled by another model would mean nothing to this one.

    Returns
    -------
    Row
    """
    ids = list(chat.prompt_ids(system, trajectory.task.prompt))
    trained = [False] * len(ids)
    for step in trajectory.steps:
        turn = chat.turn_ids(step.text)
        ids += turn
        trained += [True] * len(turn)
        if step.calls:
            pairs = zip(step.calls, step.observations, strict=True)
            observed = chat.observation_ids([(call.name, seen.content) for call, seen in pairs])
            ids += observed
            trained += [False] * len(observed)
    return Row(task_id=trajectory.task.task_id, input_ids=tuple(ids), trained=tuple(trained))


def fitting(rows: Sequence[Row], max_length: int, *, on_long: OnLong) -> list[Row]:
    """Keep the rows that fit; none is ever cut.

    Raises
    ------
    InputError
        If a row is too long and ``on_long`` is ``error``, or no row is left.
    """
    kept = [row for row in rows if len(row.input_ids) <= max_length]
    longest = max((len(row.input_ids) for row in rows), default=0)
    if len(kept) < len(rows) and on_long == "error":
        raise InputError(
            f"{len(rows) - len(kept)} of {len(rows)} trajectories exceed --max-length "
            f"{max_length} (the longest has {longest} tokens): raise it, or drop and count them "
            "with --on-long drop"
        )
    if not kept:
        raise InputError(f"no trajectory of {len(rows)} fits --max-length {max_length}")
    return kept


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows by task into training and held-out ones.

    Parameters
    ----------
    rows : sequence of Row
        Rows of one task stay together.
    share : float
        Share of the tasks held out, in [0, 1); at least one task if positive.
    seed : int
        Fixes the choice.

    Returns
    -------
    tuple of list of Row
        Training rows and held-out rows, each in the given order.
    """
    tasks = sorted({row.task_id for row in rows})
    if share > 0 and len(tasks) < 2:
        raise InputError("one task cannot be split: give more tasks, or --held-out 0")
    count = min(len(tasks) - 1, max(1, round(share * len(tasks)))) if share > 0 else 0
    random.Random(derive_seed("held-out", seed)).shuffle(tasks)  # noqa: S311
    chosen = set(tasks[:count])
    train = [row for row in rows if row.task_id not in chosen]
    return train, [row for row in rows if row.task_id in chosen]


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Group rows of similar length so that no padded batch exceeds ``max_tokens``.

    Parameters
    ----------
    indices : sequence of int
        Rows to group.
    lengths : sequence of int
        Tokens of every row, by index.
    max_tokens : int
        Bound on rows times longest row; a single longer row gets a batch of its own.

    Examples
    --------
    >>> micro_batches([0, 1, 2, 3], [2, 9, 4, 4], 8)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def plan_epoch(
    lengths: Sequence[int], step_tokens: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Shuffle rows and cut them into optimizer steps of about ``step_tokens`` tokens.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of every row.
    step_tokens : int
        A step is closed once it holds this many.
    seed, epoch : int
        The plan depends on nothing else, so a resumed run finds its place again.

    Returns
    -------
    list of list of int
        Row indices of each step; every row once.
    """
    order = list(range(len(lengths)))
    random.Random(derive_seed("epoch", seed, epoch)).shuffle(order)  # noqa: S311
    steps: list[list[int]] = [[]]
    filled = 0
    for index in order:
        if filled >= step_tokens:
            steps.append([])
            filled = 0
        steps[-1].append(index)
        filled += lengths[index]
    return steps


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right and mark what is trained on."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    for b, row in enumerate(rows):
        end = len(row.input_ids)
        ids[b, :end] = torch.tensor(row.input_ids)
        labels[b, :end] = torch.where(torch.tensor(row.trained), ids[b, :end], IGNORED)
    return Batch(input_ids_BT=ids, labels_BT=labels)


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the negative log-likelihood of the trained ids, summed, in nats.

    Notes
    -----
    Rows are padded on the right, so causal attention alone keeps padding out of every real
    position and no attention mask is needed. Only columns that predict a trained id of some row
    pass the output layer, which matters where the vocabulary is large.
    """
    labels_BT = batch.labels_BT[:, 1:]
    columns = (labels_BT != IGNORED).any(0).nonzero().squeeze(1)
    output = model(input_ids=batch.input_ids_BT, logits_to_keep=columns, use_cache=False)
    return torch.nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1),
        labels_BT[:, columns].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
