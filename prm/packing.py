"""Packing: several rows beside each other in one line of a batch, without seeing one another.

A line is as wide as the longest row of its batch, and shorter rows fill up what padding would. So
attention costs no more than with padding, and everything else less. That pays for large batches of
rows of unlike length; small batches of like rows, which a CPU prefers, leave little to fill.
Position ids begin at 0 with every row; transformers makes the block-diagonal causal mask from them.
Encoders and bases that ignore position ids would mix rows: `check_packing` finds out by running the
base once.

Dimension letters beside the project's own: P scored positions; B counts lines here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from prm.data import Batch, Example, Targets, gather_scored, mark_written, pad
from trajectory.errors import InputError

_PROBE = (5, 3, 4)
_TOLERANCE = 1e-3
"""Of the spread of the logits: a fresh head's are all nearly equal."""


def fill_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Place rows into lines as wide as the longest, longest rows first, each where it first fits.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row, at least one row.

    Returns
    -------
    list of list of int
        Row indices, per line; every row once.

    Notes
    -----
    First-fit decreasing needs at most 11/9 of the fewest lines possible, plus one (Johnson 1973).

    Examples
    --------
    >>> fill_lines([3, 10, 6, 4])
    [[1], [2, 3], [0]]
    """
    width = max(lengths)
    lines: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, free in enumerate(room) if free >= lengths[index]), len(lines))
        if place == len(lines):
            lines.append([])
            room.append(width)
        lines[place].append(index)
        room[place] -= lengths[index]
    return lines


def group_packed(
    indices: Sequence[int], lengths: Sequence[int], *, batch_tokens: int
) -> list[list[int]]:
    """Cut rows into batches whose lines hold at most ``batch_tokens`` tokens, empty ones included.

    A longer single row is a batch of its own.

    Examples
    --------
    >>> group_packed([0, 1, 2, 3], [3, 10, 6, 4], batch_tokens=20)
    [[1, 2, 3], [0]]
    """
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches:
            grown = [*batches[-1], index]
            sizes = [lengths[i] for i in grown]
            if len(fill_lines(sizes)) * sizes[0] <= batch_tokens:
                batches[-1] = grown
                continue
        batches.append([index])
    return batches


def collate_packed(
    examples: Sequence[Example],
    target: Callable[[Example], Targets],
    *,
    pad_id: int,
    inner: bool = False,
    written: bool = False,
) -> Batch:
    """Pack examples into lines and gather what `collate` gathers, in the same order.

    The empty end of a line counts positions from 0 too, so that no row sees it. With ``written``,
    the batch also says which tokens the agent wrote.
    """
    lines = fill_lines([len(e.input_ids) for e in examples])
    width = max(len(e.input_ids) for e in examples)
    line_of, start_of = [0] * len(examples), [0] * len(examples)
    ids, positions = [], []
    for number, line in enumerate(lines):
        row: list[int] = []
        numbered: list[int] = []
        for index in line:
            line_of[index], start_of[index] = number, len(row)
            row += examples[index].input_ids
            numbered += range(len(examples[index].input_ids))
        ids.append(row)
        positions.append([*numbered, *range(width - len(row))])
    input_ids_BT, attention_mask_BT = pad(ids, pad_id=pad_id)
    scored = gather_scored(examples, target, inner=inner)
    starts = list(zip(line_of, start_of, strict=True))
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        rows_P=scored.rows_P,
        columns_P=torch.tensor(start_of)[scored.rows_P] + scored.columns_P,
        targets_P=scored.targets_P,
        weights_P=scored.weights_P,
        lines_P=torch.tensor(line_of)[scored.rows_P],
        position_ids_BT=torch.tensor(positions),
        written_BT=mark_written(examples, input_ids_BT, starts=starts) if written else None,
    )


@torch.no_grad()
def check_packing(model: nn.Module, *, vocabulary: int) -> None:
    """Refuse a model that gives packed rows other logits than rows by themselves.

    Parameters
    ----------
    model : Module
        A token classifier or language model on the CPU, in float32.
    vocabulary : int
        Token ids it embeds.

    Raises
    ------
    InputError
        If packed rows see each other, or the model takes no position ids.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (1, n), generator=generator) for n in _PROBE]
    training = model.training
    model.eval()
    try:
        packed = model(
            input_ids=torch.cat(rows, dim=1),
            position_ids=torch.cat([torch.arange(n)[None] for n in _PROBE], dim=1),
            use_cache=False,
        ).logits
        alone = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    except TypeError as error:
        sentence = f"this base takes no position ids: leave out --packing ({error})"
        raise InputError(sentence) from None
    finally:
        model.train(training)
    if (packed - alone).abs().max() > _TOLERANCE * (alone.max() - alone.min()):
        raise InputError("packed rows would see each other in this base: leave out --packing")
