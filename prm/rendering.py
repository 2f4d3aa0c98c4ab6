"""Trajectories to token ids and scoring positions.

A trajectory is rendered from its structure with this package's own template (version `RENDERING`)::

    [task]
    {prompt}
    [action]                <- per step
    {step.text}
    [observation]           <- per step with tool calls
    {contents, one per line}

Every segment is tokenised on its own, so the token index where a step ends is known by
construction and never found by searching text. Prompts and observations come from outside the
model: they are tokenised with special tokens split, so no tool's output can forge one.

Prefix 0 is scored at the last token of the task, prefix t at the last token of step t's
observation (position ``observation``; of its action if it has none) or of its action (position
``action``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from transformers import PreTrainedTokenizerBase

from trajectory.errors import InputError
from trajectory.records import Trajectory

RENDERING = 1
"""Version of the template; a checkpoint is only scored with the one it was trained with."""

Position = Literal["observation", "action"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A trajectory as the model reads it."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Token index of prefix 0..S, strictly increasing."""
    written: tuple[tuple[int, int], ...] | None = None
    """First token and end of every action's segment, which the agent wrote; None if not known."""


def render(
    trajectories: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    *,
    position: Position = "observation",
) -> list[Rendered]:
    """Turn trajectories into token ids and scoring positions.

    Parameters
    ----------
    trajectories : sequence of Trajectory
        Any number of steps, also none.
    tokenizer : PreTrainedTokenizerBase
        The base model's own.
    position : {"observation", "action"}
        Where a step is scored.

    Returns
    -------
    list of Rendered
        In the same order.

    Raises
    ------
    InputError
        If the tokenizer turns a segment into nothing.
    """
    start = _start_ids(tokenizer)
    segments = [segment for t in trajectories for segment in _segments(t)]
    ids = _tokenize(segments, tokenizer)
    rendered, taken = [], 0
    for trajectory in trajectories:
        count = 1 + sum(2 if step.calls else 1 for step in trajectory.steps)
        rendered.append(_assemble(trajectory, ids[taken : taken + count], start, position))
        taken += count
    return rendered


def _segments(trajectory: Trajectory) -> list[tuple[str, bool]]:
    """List a trajectory's segments; True marks text the model did not write."""
    segments = [(f"[task]\n{trajectory.task.prompt}\n", True)]
    for step in trajectory.steps:
        segments.append((f"[action]\n{step.text}\n", False))
        if step.calls:
            contents = "\n".join(o.content for o in step.observations)
            segments.append((f"[observation]\n{contents}\n", True))
    return segments


def _tokenize(
    segments: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Tokenise every segment on its own, foreign text with special tokens split."""
    ids: list[list[int]] = [[] for _ in segments]
    for foreign in (False, True):
        places = [i for i, (_, is_foreign) in enumerate(segments) if is_foreign == foreign]
        if not places:
            continue
        encoded = tokenizer(
            [segments[i][0] for i in places],
            add_special_tokens=False,
            split_special_tokens=foreign,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for place, segment_ids in zip(places, encoded, strict=True):
            if not segment_ids:
                text = segments[place][0][:40]
                raise InputError(f"the tokenizer turns {text!r} into no tokens: use another base")
            ids[place] = segment_ids
    return ids


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text (a bos or cls token), usually nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start])
    return ()


def _assemble(
    trajectory: Trajectory, ids: Sequence[list[int]], start: tuple[int, ...], position: Position
) -> Rendered:
    """Join a trajectory's tokenised segments and note where its prefixes end."""
    input_ids = [*start, *ids[0]]
    positions = [len(input_ids) - 1]
    written = []
    segment = 1
    for step in trajectory.steps:
        written.append((len(input_ids), len(input_ids) + len(ids[segment])))
        input_ids.extend(ids[segment])
        end = len(input_ids) - 1
        segment += 1
        if step.calls:
            input_ids.extend(ids[segment])
            segment += 1
            if position == "observation":
                end = len(input_ids) - 1
        positions.append(end)
    assert all(a < b for a, b in pairwise(positions))
    return Rendered(input_ids=tuple(input_ids), positions=tuple(positions), written=tuple(written))
