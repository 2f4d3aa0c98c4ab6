"""What the decoder keeps of each request, and of the running batch as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from agent.engines.base import GenerateRequest
from agent.engines.sampling import SamplingColumns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(eq=False, kw_only=True, slots=True)
class Turn:
    """A request in progress; keeps what was sampled when it is set aside."""

    request: GenerateRequest
    limit: int
    """Sequence length at which generation is cut off, tokens."""
    ids: list[int] = field(default_factory=list)
    """Prompt and sampled ids."""
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    order: int = -1
    """Admission number: the newest turn is set aside first."""

    @property
    def sampled(self) -> list[int]:
        """Ids generated so far."""
        return self.ids[len(self.request.prompt_ids) :]


@dataclass(kw_only=True, slots=True)
class Batch:
    """The active turns as columns; N rows, row ``i`` in slot ``i``."""

    turns: list[Turn]
    sampling: SamplingColumns
    limits_N: NDArray[np.int64]
    stops: NDArray[np.int64]
    """Stop ids, shape (N, most per turn), padded with -1."""
    asked: list[int]
    """Rows whose request has a ``stop_when``."""
    last_N: NDArray[np.int64]
    """The token to feed next."""

    @classmethod
    def of(cls, turns: list[Turn]) -> Batch:
        """Gather the settings of the active turns."""
        samplings = [turn.request.sampling for turn in turns]
        most = max((len(turn.request.stop_ids) for turn in turns), default=0)
        stops = np.full((len(turns), most), -1, dtype=np.int64)
        for row, turn in zip(stops, turns, strict=True):
            row[: len(turn.request.stop_ids)] = turn.request.stop_ids
        seeds = [turn.request.seed & 0xFFFF_FFFF_FFFF_FFFF for turn in turns]
        return cls(
            turns=turns,
            sampling=SamplingColumns(
                seeds_B=np.array(seeds, dtype=np.uint64),
                temperatures_B=np.array([s.temperature for s in samplings], dtype=np.float64),
                top_ps_B=np.array([s.top_p for s in samplings], dtype=np.float64),
                top_ks_B=np.array([s.top_k for s in samplings], dtype=np.int64),
            ),
            limits_N=np.array([turn.limit for turn in turns], dtype=np.int64),
            stops=stops,
            asked=[i for i, turn in enumerate(turns) if turn.request.stop_when is not None],
            last_N=np.array([turn.ids[-1] for turn in turns], dtype=np.int64),
        )

    def extend(self, ids_N: NDArray[np.int64], logprobs_N: NDArray[np.float64]) -> None:
        """Append one sampled token to every turn."""
        self.last_N = ids_N
        pairs = zip(self.turns, ids_N.tolist(), logprobs_N.tolist(), strict=True)
        for turn, token, logprob in pairs:
            turn.ids.append(token)
            turn.logprobs.append(logprob)

    def ended(self, lengths_N: NDArray[np.int64]) -> list[int]:
        """Decide which turns are over, given their lengths, and say so in each ``finish``."""
        stopped_N = (self.last_N[:, None] == self.stops).any(axis=1)
        for row in self.asked:
            stop_when = self.turns[row].request.stop_when
            if stop_when is not None and stop_when(self.turns[row].sampled):
                stopped_N[row] = True
        rows: list[int] = np.flatnonzero(stopped_N | (lengths_N >= self.limits_N)).tolist()
        for row in rows:
            self.turns[row].finish = "stop" if stopped_N[row] else "length"
        return rows


def group_by_length(missing: Mapping[int, tuple[int, Sequence[int]]]) -> list[list[int]]:
    """Split slots into groups for one prefill pass each.

    Parameters
    ----------
    missing : mapping of int to (int, sequence of int)
        Per slot: tokens it already holds, and the ids to add.

    Returns
    -------
    list of lists of int
        Slots that start empty apart from the others; within a group lengths differ by at most a
        quarter plus eight, so little is spent on padding.

    Examples
    --------
    >>> group_by_length({0: (0, [1] * 9), 1: (5, [1]), 2: (0, [1] * 40), 3: (0, [1] * 10)})
    [[0, 3], [2], [1]]
    """
    groups: list[list[int]] = []
    shortest = 0
    fresh = False
    for slot in sorted(missing, key=lambda s: (missing[s][0] > 0, len(missing[s][1]), s)):
        start, new = missing[slot]
        same_kind = bool(groups) and fresh == (start == 0)
        if not same_kind or len(new) > 1.25 * shortest + 8:
            groups.append([])
            shortest, fresh = len(new), start == 0
        groups[-1].append(slot)
    return groups
