"""Trajectories to token ids and scoring positions.

A trajectory is rendered from its structure with this package's own template (version `RENDERING`)::

    [task]
    {prompt}
    [action]                <- per step
    {step.text}
    [observation]           <- per call of the step, in call order
    {observation.content}

Every segment is tokenised on its own, so the token index where a step or a call ends is known by
construction and never found by searching text. Prompts and observations come from outside the
model: they are tokenised with special tokens split, so no tool's output can forge one.

Prefix 0 is scored at the last token of the task, prefix t at the last token of step t's last
observation (position ``observation``; of its action if it has none) or of its action (position
``action``).

Each call of a step is scored too. At position ``observation`` call j of k is scored at the last
token of its own result, so the last call is scored where its step is. The network then has read
the whole turn and the results of calls 1..j, and the score is the expected value of the step's
end, ``E[V(s_t) | turn t, observations 1..j]``; the change from call j-1 to call j (for the first:
from prefix t-1, the writing of the turn included) is that call's credit. At position ``action`` the
calls of a turn are one text, in whatever syntax the model writes, whose inner ends are not known
by construction, and no result separates them: they share the step's position and so its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from transformers import PreTrainedTokenizerBase

from trajectory.errors import InputError
from trajectory.records import Trajectory

RENDERING = 2
"""Version of the template; a checkpoint is only scored with the one it was trained with. Version 1
joined the observations of a step in one segment; steps of at most one call are alike in both."""

Position = Literal["observation", "action"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A trajectory as the model reads it."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Token index of prefix 0..S, strictly increasing."""
    calls: tuple[tuple[int, ...], ...] = ()
    """Per step, the token index at which each of its calls is scored, ascending; the last is the
    step's own. Empty: prefixes alone are scored."""
    written: tuple[tuple[int, int], ...] | None = None
    """First token and end of every action's segment, which the agent wrote; None if not known."""

    @property
    def scored(self) -> tuple[int, ...]:
        """Token index of everything that is scored, prefixes and calls, ascending, each once."""
        return tuple(sorted({*self.positions, *(p for calls in self.calls for p in calls)}))


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
        count = 1 + sum(1 + len(step.calls) for step in trajectory.steps)
        rendered.append(_assemble(trajectory, ids[taken : taken + count], start, position))
        taken += count
    return rendered


def _segments(trajectory: Trajectory) -> list[tuple[str, bool]]:
    """List a trajectory's segments; True marks text the model did not write."""
    segments = [(f"[task]\n{trajectory.task.prompt}\n", True)]
    for step in trajectory.steps:
        segments.append((f"[action]\n{step.text}\n", False))
        segments += [(f"[observation]\n{o.content}\n", True) for o in step.observations]
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
    """Join a trajectory's tokenised segments and note where its prefixes and calls end."""
    segments = iter(ids)
    input_ids = [*start, *next(segments)]
    positions, calls, written = [len(input_ids) - 1], [], []
    for step in trajectory.steps:
        begin = len(input_ids)
        input_ids += next(segments)
        written.append((begin, len(input_ids)))
        end = len(input_ids) - 1
        ends = []
        for _ in step.calls:
            input_ids += next(segments)
            ends.append(len(input_ids) - 1 if position == "observation" else end)
        positions.append(ends[-1] if ends else end)
        calls.append(tuple(ends))
    assert all(a < b for a, b in pairwise(positions))
    return Rendered(
        input_ids=tuple(input_ids),
        positions=tuple(positions),
        calls=tuple(calls),
        written=tuple(written),
    )
