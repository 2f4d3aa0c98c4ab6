"""Rendered trajectories to examples with targets, and examples to the tensors of a batch.

Rows are never cut: one that is too long is an error or dropped and counted.

What is known of a turn belongs to its end: rollouts start there. The positions after each result of
a turn of several calls but the last (*inner* positions) are trained with the same counts or label,
for their score is ``E[V(s_t) | turn t, observations 1..j]`` (`prm.rendering`), and by the tower
property ``E[E[y | s_t] | turn t, observations 1..j] = E[y | turn t, observations 1..j]``: what was
drawn at the end of the turn is an unbiased sample for its inner positions as well. The k positions
of a turn weigh 1/k each, so that a turn weighs the same however many calls it makes. Whatever
measures (held-out loss, calibration, metrics) is of prefixes alone.

Dimension letters beside the project's own: P scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from prm.rendering import Position, Rendered, render
from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory

OnLong = Literal["error", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What a head is trained towards, per prefix 0..S."""

    values: tuple[float, ...]
    """In [0, 1]; meaningless where the weight is 0."""
    weights: tuple[float, ...]
    """>= 0; 0 masks the prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One rendered trajectory with everything a head may be trained towards."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Token index of prefix 0..S."""
    rollouts: tuple[int, ...]
    """Usable rollouts per prefix: those that infrastructure did not break."""
    correct: tuple[int, ...]
    """Right answers among them; a truncated rollout counts as not right."""
    values: tuple[float | None, ...]
    """The estimator's label per prefix; None where unknown."""
    task_id: str
    trajectory_id: str
    calls: tuple[tuple[int, ...], ...] = ()
    """Per step, the token index at which each of its calls is scored; the last is the step's own.
    Empty: prefixes alone are scored."""
    written: tuple[tuple[int, int], ...] | None = None
    """First token and end of every part that the agent wrote; None if not known."""

    def __post_init__(self) -> None:
        steps = self.positions[1:]
        if self.calls and (
            len(self.calls) != len(steps)
            or any(c and c[-1] != p for c, p in zip(self.calls, steps, strict=True))
        ):
            raise InputError(
                f"row {self.trajectory_id}: its steps end at tokens {steps}, their calls at "
                f"{self.calls}; give every step's calls, the last ending where the step does"
            )
        sizes = [len(self.positions), len(self.rollouts), len(self.correct), len(self.values)]
        if len(set(sizes)) != 1:
            raise InputError(
                f"row {self.trajectory_id}: {sizes[0]} scored prefixes, but {sizes[1]} rollout "
                f"counts, {sizes[2]} counts of right answers and {sizes[3]} labels"
            )
        for t, (n, c, v) in enumerate(zip(self.rollouts, self.correct, self.values, strict=True)):
            if not 0 <= c <= n:
                raise InputError(
                    f"row {self.trajectory_id}, prefix {t}: {c} right answers of {n} rollouts; "
                    "give counts with 0 <= right <= rollouts"
                )
            if v is not None and not 0 <= v <= 1:
                raise InputError(
                    f"row {self.trajectory_id}, prefix {t}: label {v} is not in [0, 1]; give None "
                    "where it is unknown"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded tensors of one forward pass."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    """1 on real tokens; padding is on the right."""
    rows_P: torch.Tensor
    columns_P: torch.Tensor
    """Row and token index of every scored position, rows in order, tokens in order."""
    targets_P: torch.Tensor
    weights_P: torch.Tensor
    lines_P: torch.Tensor | None = None
    """Line of the tensors that holds each position; None where every row has one of its own."""
    position_ids_BT: torch.Tensor | None = None
    """Depth of each token in its row, 0 at the first; None where rows are only padded."""
    ancestors_TT: torch.Tensor | None = None
    """What each token of a single line sees, where rows share their prefixes (`prm.prefix_tree`);
    None elsewhere."""
    written_BT: torch.Tensor | None = None
    """True on the tokens that the agent wrote; None for heads that do not ask."""
    parents_T: torch.Tensor | None = None
    """Index of the token that each token of such a tree follows, -1 at the beginning of a row; None
    elsewhere and for heads that do not ask who wrote what."""


def make_examples(
    rows: Sequence[LabelledTrajectory],
    tokenizer: PreTrainedTokenizerBase,
    *,
    position: Position = "observation",
) -> list[Example]:
    """Render labelled trajectories and attach their counts and labels.

    Notes
    -----
    The value of a finished, judged trajectory is its outcome, known without rollouts. Where its
    last prefix has none, the outcome stands in, with the mean weight of the trajectory's measured
    prefixes (at least 1), so that the last score is trained like the others.

    All trajectories of a task begin in the same state, which is measured once and recorded with
    each of them. Only the first of those with equal counts carries it as a target; otherwise the
    same rollouts would count once per trajectory.
    """
    rendered = render([row.trajectory for row in rows], tokenizer, position=position)
    seen: set[tuple[str, str, int, int]] = set()
    examples = []
    for row, text in zip(rows, rendered, strict=True):
        evidence = row.evidence
        task_id = row.trajectory.task.task_id
        start = (task_id, evidence.completer, evidence.rollouts[0], evidence.correct[0])
        repeated = start in seen and row.trajectory.num_steps > 0
        seen.add(start)
        examples.append(_example(row, text, mask_start=repeated))
    return examples


def _example(row: LabelledTrajectory, rendered: Rendered, *, mask_start: bool) -> Example:
    """Attach counts and labels to a rendered trajectory."""
    evidence, outcome = row.evidence, row.trajectory.outcome
    rollouts = [n - f for n, f in zip(evidence.rollouts, evidence.failed, strict=True)]
    correct = list(evidence.correct)
    values = list(row.labels.values)
    if mask_start:
        rollouts[0], correct[0], values[0] = 0, 0, None
    if outcome is not None:
        if rollouts[-1] == 0:
            measured = [n for n in rollouts if n] or [1]
            rollouts[-1] = round(sum(measured) / len(measured))
            correct[-1] = rollouts[-1] if outcome >= 0.5 else 0
        if values[-1] is None:
            values[-1] = outcome
    return Example(
        input_ids=rendered.input_ids,
        positions=rendered.positions,
        rollouts=tuple(rollouts),
        correct=tuple(correct),
        values=tuple(values),
        task_id=row.trajectory.task.task_id,
        trajectory_id=row.trajectory.trajectory_id,
        calls=rendered.calls,
        written=rendered.written,
    )


class Place(NamedTuple):
    """A scored position of an example with what it is trained towards."""

    column: int
    """Token index in the example."""
    target: float
    weight: float


def places(example: Example, targets: Targets, *, inner: bool) -> list[Place]:
    """List an example's scored positions in the order of its tokens.

    Parameters
    ----------
    example : Example
        S steps.
    targets : Targets
        What a head makes of its prefixes 0..S.
    inner : bool
        Whether the calls inside a turn are scored too; the positions of a turn then share its
        weight, and where they are one (position ``action``) it is undivided.

    Examples
    --------
    >>> example = Example(
    ...     input_ids=(7,) * 9, positions=(1, 8), calls=((5, 8),), rollouts=(4, 4), correct=(2, 1),
    ...     values=(0.5, 0.25), task_id="t", trajectory_id="t/0",
    ... )
    >>> targets = Targets(values=(0.5, 0.25), weights=(4.0, 4.0))
    >>> [tuple(place) for place in places(example, targets, inner=True)]
    [(1, 0.5, 4.0), (5, 0.25, 2.0), (8, 0.25, 2.0)]
    """
    found: list[Place] = []
    rows = zip(example.positions, targets.values, targets.weights, strict=True)
    for t, (position, target, weight) in enumerate(rows):
        calls = example.calls[t - 1] if inner and t and example.calls else ()
        columns = dict.fromkeys((*calls, position))  # distinct, in order
        found += [Place(column, target, weight / len(columns)) for column in columns]
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """The scored positions of examples, in their order and that of their tokens."""

    rows_P: torch.Tensor
    """Which example each belongs to."""
    columns_P: torch.Tensor
    """Its token index there."""
    targets_P: torch.Tensor
    weights_P: torch.Tensor


def gather_scored(
    examples: Sequence[Example], target: Callable[[Example], Targets], *, inner: bool
) -> Scored:
    """Gather the scored positions of examples and their targets (see `places`)."""
    found = [places(e, target(e), inner=inner) for e in examples]
    flat = [(row, place) for row, row_places in enumerate(found) for place in row_places]
    return Scored(
        rows_P=torch.tensor([row for row, _ in flat]),
        columns_P=torch.tensor([place.column for _, place in flat]),
        targets_P=torch.tensor([place.target for _, place in flat], dtype=torch.float32),
        weights_P=torch.tensor([place.weight for _, place in flat], dtype=torch.float32),
    )


def keep_short(
    examples: Sequence[Example], *, max_length: int, on_long: OnLong
) -> tuple[list[Example], int]:
    """Separate out examples that do not fit the model; nothing is ever cut.

    Returns
    -------
    tuple of (list of Example, int)
        Those that fit, and how many were dropped.

    Raises
    ------
    InputError
        If one is too long and ``on_long`` is ``error``.
    """
    long = [e for e in examples if len(e.input_ids) > max_length]
    if long and on_long == "error":
        worst = max(long, key=lambda e: len(e.input_ids))
        raise InputError(
            f"{len(long)} of {len(examples)} trajectories are longer than {max_length} tokens "
            f"({worst.trajectory_id}: {len(worst.input_ids)}); raise --max-length, or drop and "
            "count them with --on-long drop"
        )
    return [e for e in examples if len(e.input_ids) <= max_length], len(long)


def collate(
    examples: Sequence[Example],
    target: Callable[[Example], Targets],
    *,
    pad_id: int,
    inner: bool = False,
    written: bool = False,
) -> Batch:
    """Pad examples on the right and gather their scored positions and targets (see `places`).

    With ``written``, the batch also says which tokens the agent wrote.
    """
    scored = gather_scored(examples, target, inner=inner)
    input_ids_BT, attention_mask_BT = pad([e.input_ids for e in examples], pad_id=pad_id)
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        rows_P=scored.rows_P,
        columns_P=scored.columns_P,
        targets_P=scored.targets_P,
        weights_P=scored.weights_P,
        written_BT=mark_written(examples, input_ids_BT) if written else None,
    )


def mark_written(
    rows: Sequence[Example | Rendered],
    like_BT: torch.Tensor,
    *,
    starts: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Mark the tokens that the agent wrote.

    Parameters
    ----------
    rows : sequence of Example or of Rendered
        With their written parts.
    like_BT : Tensor, shape (B, T)
        Token ids that hold the rows.
    starts : sequence of (int, int), optional
        Line of each row and where it begins there; by default every row has a line of its own.

    Returns
    -------
    Tensor of bool, shape (B, T)
        True on written tokens.

    Raises
    ------
    InputError
        If a row does not know them, or they lie outside it or on its first token, which nothing
        predicts.
    """
    mask_BT = torch.zeros_like(like_BT, dtype=torch.bool)
    for number, row in enumerate(rows):
        line, start = (number, 0) if starts is None else starts[number]
        if row.written is None:
            raise InputError(
                "which tokens of a row the agent wrote is not known, and this head asks: make rows "
                "with `prm.rendering.render`"
            )
        for begin, end in row.written:
            if not 1 <= begin <= end <= len(row.input_ids):
                raise InputError(
                    f"a row of {len(row.input_ids)} tokens cannot be written by the agent from "
                    f"token {begin} to {end}: give parts inside it, after its first token"
                )
            mask_BT[line, start + begin : start + end] = True
    return mask_BT


def pad(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad id rows on the right; returns ids and attention mask, both of shape (B, T)."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids_BT, mask_BT
