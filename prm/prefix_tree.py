"""Prefix sharing: what several rows begin with in common is read once.

Rows that branch off each other (candidates for one step, rollouts of one state, attempts at one
task) repeat their prefix token by token. In a batch made here they form a tree: a token attends to
its ancestors and to nothing else, and its position id is its depth, so every row gets the logits it
would get alone, and the loss and gradient are the same. Of PRM800K phase 1, whose rated steps are
the leaves of trees, an epoch then reads a fourteenth of the tokens (docs/results/prm_speed.md).

A batch is one line of tokens with an attention mask of its own, which only a causal model under
PyTorch's scaled-dot-product attention follows: `check_prefix_sharing` finds out by running the base
once.

Dimension letters beside the project's own: P scored positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from prm.data import Batch, Example, Targets, gather_scored, mark_written
from trajectory.errors import InputError
from trajectory.seeds import derive_seed

_PROBE = ((1, 2, 3, 4, 5), (1, 2, 3, 6), (7, 8, 9))
_OTHER_PACKING = "choose another --packing"
_TOLERANCE = 1e-3
"""Of the spread of the logits: a fresh head's are all nearly equal."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrefixTree:
    """Rows of tokens merged where they agree from their beginning on."""

    input_ids: tuple[int, ...]
    """Tokens of the tree, each after its ancestors."""
    parents: tuple[int, ...]
    """Index of the token before each token; -1 at the beginning of a row."""
    depths: tuple[int, ...]
    """How many ancestors each token has."""
    columns: tuple[tuple[int, ...], ...]
    """For every row, in the order given, where each of its tokens stands in the tree."""


def merge_prefixes(rows: Sequence[Sequence[int]]) -> PrefixTree:
    """Merge rows into a tree; those with nothing in common become trees beside each other.

    Examples
    --------
    >>> tree = merge_prefixes([(5, 6, 8), (5, 6, 7, 9), (4,)])
    >>> tree.input_ids, tree.parents, tree.depths
    ((4, 5, 6, 7, 9, 8), (-1, -1, 1, 2, 3, 2), (0, 0, 1, 2, 3, 2))
    >>> tree.columns
    ((1, 2, 5), (1, 2, 3, 4), (0,))
    """
    input_ids: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    columns: list[tuple[int, ...]] = [()] * len(rows)
    before: Sequence[int] = ()
    path: tuple[int, ...] = ()
    # In this order a row has no more in common with any earlier row than with the one before it.
    for index in sorted(range(len(rows)), key=lambda i: tuple(rows[i])):
        row = rows[index]
        shared = common_prefix(before, row)
        first, count = len(input_ids), len(row) - shared
        new = range(first, first + count)
        if count:
            parents += [path[shared - 1] if shared else -1, *new[:-1]]
        input_ids += row[shared:]
        depths += range(shared, len(row))
        path = (*path[:shared], *new)
        columns[index], before = path, row
    return PrefixTree(
        input_ids=tuple(input_ids),
        parents=tuple(parents),
        depths=tuple(depths),
        columns=tuple(columns),
    )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens two rows have in common from their beginning on.

    Examples
    --------
    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([], [1])
    (2, 0)
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def ancestor_mask(parents: Sequence[int]) -> torch.Tensor:
    """Tell which tokens each token of a tree sees: itself and its ancestors.

    Returns
    -------
    Tensor of bool, shape (T, T)
        Row i is what token i sees.

    Examples
    --------
    >>> ancestor_mask([-1, 0, 0]).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    mask_TT = np.eye(len(parents), dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            mask_TT[token, :token] = mask_TT[parent, :token]
    return torch.from_numpy(mask_TT)


def plan_trees(
    examples: Sequence[Example], *, step_tokens: int, batch_tokens: int, seed: int
) -> list[list[list[int]]]:
    """Cut a shuffled epoch into optimizer steps and each into batches, keeping tasks together.

    Parameters
    ----------
    examples : sequence of Example
        Those of one task share at least its prompt, so tasks are shuffled and not rows.
    step_tokens : int
        Tokens read in one optimizer step, about; a task with more is cut.
    batch_tokens : int
        Most tokens read in one forward pass; a longer single row is a batch of its own.
    seed : int
        Decides the shuffle; the same seed gives the same plan.

    Returns
    -------
    list of list of list of int
        Example indices, per optimizer step, per batch. Every example is used exactly once.
    """
    tasks: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        tasks.setdefault(example.task_id, []).append(index)
    order = list(tasks)
    random.Random(derive_seed("prm-epoch", seed)).shuffle(order)  # noqa: S311 - not security
    rows = [e.input_ids for e in examples]
    parts = [p for task in order for p in group_trees(tasks[task], rows, batch_tokens=step_tokens)]
    steps = _join(parts, rows, step_tokens)
    return [group_trees(step, rows, batch_tokens=batch_tokens) for step in steps]


def _join(
    parts: Sequence[list[int]], rows: Sequence[Sequence[int]], step_tokens: int
) -> list[list[int]]:
    """Join neighbouring parts while they fit one step."""
    steps: list[list[int]] = []
    tokens = 0
    for part in parts:
        size = tree_size([rows[i] for i in part])
        if not steps or tokens + size > step_tokens:
            steps.append([])
            tokens = 0
        steps[-1] = [*steps[-1], *part]
        tokens += size
    return steps


def group_trees(
    indices: Sequence[int], rows: Sequence[Sequence[int]], *, batch_tokens: int
) -> list[list[int]]:
    """Cut rows into batches whose trees have at most ``batch_tokens`` tokens.

    A longer single row is a batch of its own.

    Examples
    --------
    >>> group_trees([0, 1, 2, 3], [(1, 2, 3), (7, 8), (1, 2, 4), (1, 2, 3, 5)], batch_tokens=5)
    [[0, 3, 2], [1]]
    """
    batches: list[list[int]] = []
    tokens = 0
    before: Sequence[int] = ()
    for index in sorted(indices, key=lambda i: (tuple(rows[i]), i)):
        row = rows[index]
        size = len(row) - common_prefix(before, row)
        if not batches or tokens + size > batch_tokens:
            batches.append([])
            tokens, size = 0, len(row)
        batches[-1].append(index)
        tokens += size
        before = row
    return batches


def tree_size(rows: Sequence[Sequence[int]]) -> int:
    """Count the tokens that are left when rows share their prefixes."""
    ordered = sorted(tuple(row) for row in rows)
    pairs = zip([(), *ordered], ordered, strict=False)
    return sum(len(row) - common_prefix(before, row) for before, row in pairs)


def collate_tree(
    examples: Sequence[Example],
    target: Callable[[Example], Targets],
    *,
    pad_id: int,
    inner: bool = False,
    written: bool = False,
) -> Batch:
    """Merge examples into one line and gather their scored positions and targets, in their order.

    A token that several rows are scored at stands in the batch once for each of them. Nothing is
    padded. With ``written``, the batch also says which tokens the agent wrote, and rows share a
    prefix only as far as the same parts of it are the agent's.
    """
    del pad_id
    tree, written_T = _merge_written(examples) if written else (_merge(examples), None)
    scored = gather_scored(examples, target, inner=inner)
    pairs = zip(scored.rows_P.tolist(), scored.columns_P.tolist(), strict=True)
    return Batch(
        input_ids_BT=torch.tensor([tree.input_ids]),
        attention_mask_BT=torch.ones(1, len(tree.input_ids), dtype=torch.long),
        rows_P=scored.rows_P,
        columns_P=torch.tensor([tree.columns[row][column] for row, column in pairs]),
        targets_P=scored.targets_P,
        weights_P=scored.weights_P,
        lines_P=torch.zeros_like(scored.rows_P),
        position_ids_BT=torch.tensor([tree.depths]),
        ancestors_TT=ancestor_mask(tree.parents),
        written_BT=None if written_T is None else torch.tensor([written_T]),
        parents_T=torch.tensor(tree.parents) if written else None,
    )


def _merge(examples: Sequence[Example]) -> PrefixTree:
    """Merge examples by their tokens."""
    return merge_prefixes([e.input_ids for e in examples])


def _merge_written(examples: Sequence[Example]) -> tuple[PrefixTree, list[bool]]:
    """Merge examples by their tokens and who wrote these; says so of every token of the tree."""
    rows = []
    for example in examples:
        ids_BT = torch.tensor([example.input_ids])
        marked_BT = 2 * ids_BT + mark_written([example], ids_BT)
        rows.append(marked_BT[0].tolist())
    tree = merge_prefixes(rows)
    ids = tuple(marked // 2 for marked in tree.input_ids)
    return replace(tree, input_ids=ids), [marked % 2 == 1 for marked in tree.input_ids]


@torch.no_grad()
def check_prefix_sharing(model: nn.Module, *, vocabulary: int) -> None:
    """Refuse a model that gives rows of a tree other logits than rows by themselves.

    Parameters
    ----------
    model : Module
        A token classifier or language model on the CPU, in float32.
    vocabulary : int
        Token ids it embeds.

    Raises
    ------
    InputError
        If the model looks ahead, or does not follow the mask.
    """
    rows = [tuple(i % vocabulary for i in row) for row in _PROBE]
    tree = merge_prefixes(rows)
    training = model.training
    model.eval()
    try:
        merged = model(
            input_ids=torch.tensor([tree.input_ids]),
            attention_mask=ancestor_mask(tree.parents)[None, None],
            position_ids=torch.tensor([tree.depths]),
            use_cache=False,
        ).logits[0]
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    except (TypeError, ValueError) as error:
        sentence = f"this base takes no attention mask of a tree: {_OTHER_PACKING} ({error})"
        raise InputError(sentence) from None
    finally:
        model.train(training)
    found = torch.cat([merged[list(path)] for path in tree.columns])
    expected = torch.cat(alone)
    if (found - expected).abs().max() > _TOLERANCE * (expected.max() - expected.min()):
        raise InputError(f"rows of a tree would see each other in this base: {_OTHER_PACKING}")
