"""How examples are laid out in forward passes: padded, packed beside each other, or as a tree.

The choice changes neither loss nor gradient, only how many tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from prm.data import Batch, Example, Targets, collate
from prm.packing import check_packing, collate_packed, group_packed
from prm.plan import group_by_length, plan_steps
from prm.prefix_tree import check_prefix_sharing, collate_tree, group_trees, plan_trees, tree_size

Packing = Literal["none", "rows", "prefixes"]


class Plan(Protocol):
    """Cuts a shuffled epoch into optimizer steps and each into batches of example indices."""

    def __call__(
        self, examples: Sequence[Example], *, step_tokens: int, batch_tokens: int, seed: int
    ) -> list[list[list[int]]]:
        """Use every example exactly once."""
        ...


class Collate(Protocol):
    """Makes the tensors of one forward pass."""

    def __call__(
        self,
        examples: Sequence[Example],
        target: Callable[[Example], Targets],
        *,
        pad_id: int,
        inner: bool = False,
        written: bool = False,
    ) -> Batch:
        """Keep the examples' order among the scored positions; ``inner``: see `prm.data.places`.

        With ``written``, also mark the tokens that the agent wrote.
        """
        ...


def _accept(model: nn.Module, *, vocabulary: int) -> None:
    """Every model takes padded rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to lay examples out."""

    plan: Plan
    batches: Callable[[Sequence[Example], int], list[list[int]]]
    """Examples and most tokens of a pass to batches of example indices, for passes without
    gradients."""
    collate: Collate
    tokens: Callable[[Sequence[Example]], int]
    """Tokens of examples that are read, padding aside."""
    check: Callable[..., None]
    """Refuses, with `InputError`, a model that gives other results when rows are laid out so."""


def _padded_plan(
    examples: Sequence[Example], *, step_tokens: int, batch_tokens: int, seed: int
) -> list[list[list[int]]]:
    lengths = _lengths(examples)
    return plan_steps(lengths, step_tokens=step_tokens, batch_tokens=batch_tokens, seed=seed)


def _packed_plan(
    examples: Sequence[Example], *, step_tokens: int, batch_tokens: int, seed: int
) -> list[list[list[int]]]:
    return plan_steps(
        _lengths(examples),
        step_tokens=step_tokens,
        batch_tokens=batch_tokens,
        seed=seed,
        group=group_packed,
    )


def _by_length(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    return group_by_length(range(len(examples)), _lengths(examples), batch_tokens=batch_tokens)


def _packed_batches(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    return group_packed(range(len(examples)), _lengths(examples), batch_tokens=batch_tokens)


def _by_prefix(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    rows = [e.input_ids for e in examples]
    return group_trees(range(len(rows)), rows, batch_tokens=batch_tokens)


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(e.input_ids) for e in examples]


def _all_tokens(examples: Sequence[Example]) -> int:
    return sum(_lengths(examples))


def _tree_tokens(examples: Sequence[Example]) -> int:
    return tree_size([e.input_ids for e in examples])


LAYOUTS: dict[Packing, Layout] = {
    "none": Layout(
        plan=_padded_plan,
        batches=_by_length,
        collate=collate,
        tokens=_all_tokens,
        check=_accept,
    ),
    "rows": Layout(
        plan=_packed_plan,
        batches=_packed_batches,
        collate=collate_packed,
        tokens=_all_tokens,
        check=check_packing,
    ),
    "prefixes": Layout(
        plan=plan_trees,
        batches=_by_prefix,
        collate=collate_tree,
        tokens=_tree_tokens,
        check=check_prefix_sharing,
    ),
}
