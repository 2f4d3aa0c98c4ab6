"""Which examples meet in an optimizer step and in a forward pass: batches by token budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from trajectory.seeds import derive_seed


def plan_steps(
    lengths: Sequence[int],
    *,
    step_tokens: int,
    batch_tokens: int,
    seed: int,
    group: Callable[..., list[list[int]]] | None = None,
) -> list[list[list[int]]]:
    """Cut a shuffled epoch into optimizer steps, and each step into padded batches.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each example.
    step_tokens : int
        Real tokens of one optimizer step, about; the last step may be smaller.
    batch_tokens : int
        Most padded tokens of one forward pass; a longer single example is a batch of its own.
    seed : int
        Decides the shuffle; the same seed gives the same plan.
    group : callable, optional
        Cuts a step into batches; None is `group_by_length`.

    Returns
    -------
    list of list of list of int
        Example indices, per optimizer step, per batch. Every example is used exactly once. Steps
        are random; only inside a step are examples grouped by length, so gradients stay unbiased.
    """
    order = list(range(len(lengths)))
    random.Random(derive_seed("prm-epoch", seed)).shuffle(order)  # noqa: S311 - not security
    steps: list[list[int]] = [[]]
    tokens = 0
    for index in order:
        if steps[-1] and tokens + lengths[index] > step_tokens:
            steps.append([])
            tokens = 0
        steps[-1].append(index)
        tokens += lengths[index]
    cut = group or group_by_length
    return [cut(step, lengths, batch_tokens=batch_tokens) for step in steps if step]


def group_by_length(
    indices: Sequence[int], lengths: Sequence[int], *, batch_tokens: int
) -> list[list[int]]:
    """Pack examples of similar length into batches of at most ``batch_tokens`` padded tokens.

    Examples
    --------
    >>> group_by_length([0, 1, 2, 3], [5, 1, 2, 5], batch_tokens=10)
    [[0, 3], [2, 1]]
    """
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest, so it decides the padded width.
        fits = batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
