"""Continuous batching: which sequences share a forward pass, and where their keys lie.

Dimension letters: N rows of one forward pass, R slots, W tokens a slot can hold.

Waiting turns are prefilled into slots and join the running batch; finished ones leave it. Active
sequences always occupy slots ``0 .. N-1``, so attention reads the cache without a copy. The keys
of a finished turn stay in its slot until the room is needed: the next turn of the same episode,
or another rollout from the same prefix, starts with them and computes only what is new.

Everything is a function of the sequence of calls: no clock, no randomness, no threads.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from agent.engines.base import EngineStats
from agent.engines.runner import Runner
from agent.engines.sampling import sample
from agent.engines.turns import Batch, Turn, group_by_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFILL_TOKENS = 4096
"""Tokens of one prefill wave: bounds its memory and how long the event loop waits."""
_WIDTH_STEP = 64
"""Slot widths are multiples of this."""
_WIDTH_SPARE = 32
"""Room kept after the longest sequence when slots are laid out anew."""
_MIN_REUSE = 8
"""Shorter common prefixes are not worth a copy."""


class Decoder:
    """The running batch, its waiting line and its slots.

    Parameters
    ----------
    runner : Runner
        Model and cache storage.
    stats : EngineStats
        Token counts are added here.
    max_batch : int
        Most sequences decoded together.
    max_cache_tokens : int
        Bound on R * W, at least the longest sequence.
    """

    def __init__(
        self, runner: Runner, stats: EngineStats, *, max_batch: int, max_cache_tokens: int
    ) -> None:
        self._runner = runner
        self._stats = stats
        self._max_batch = max_batch
        self._max_cache_tokens = max_cache_tokens
        self._waiting: deque[Turn] = deque()
        self._admitted = 0
        self._tick = 0
        self._batch: Batch | None = None
        self.release()

    def release(self) -> None:
        """Forget every sequence and give the cache's memory back."""
        self._waiting.clear()
        self._runner.release()
        self._batch = None
        self._turns: list[Turn | None] = []
        self._tokens_RW = np.zeros((0, 0), dtype=np.int64)
        self._kv_R = np.zeros(0, dtype=np.int64)
        self._used_R = np.zeros(0, dtype=np.int64)
        self._num_active = 0

    def forget_prefixes(self) -> None:
        """Drop the keys kept of finished turns (the weights have changed)."""
        for slot, turn in enumerate(self._turns):
            if turn is None:
                self._kv_R[slot] = 0

    def add(self, turn: Turn) -> None:
        """Put a turn at the end of the waiting line."""
        self._waiting.append(turn)

    def drop(self, turn: Turn) -> None:
        """Take a turn out, wherever it is."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn in self._turns:
            self._vacate(self._turns.index(turn))

    @property
    def turns(self) -> list[Turn]:
        """Every turn in progress."""
        return [t for t in self._turns if t is not None] + list(self._waiting)

    def step(self) -> list[Turn]:
        """Do one unit of work: prefill a wave of waiting turns, or decode one token of all.

        Returns
        -------
        list of Turn
            Those that finished.
        """
        self._tick += 1
        wave = self._admit()
        if wave:
            self._prefill(wave)
            return []
        if not self._num_active:
            return []
        self._make_room()
        self._compact()
        return self._decode()

    # -- admission ---------------------------------------------------------------------------

    def _admit(self) -> list[int]:
        """Give slots to the next waiting turns; return those slots."""
        count = self._count_admissible()
        wave: list[int] = []
        seen: set[tuple[int, ...]] = set()
        deferred: list[Turn] = []
        new_tokens = 0
        while count and new_tokens < _PREFILL_TOKENS:
            count -= 1
            turn = self._waiting.popleft()
            key = tuple(turn.ids)
            if key in seen:  # the next wave copies this prompt's keys instead
                deferred.append(turn)
                continue
            seen.add(key)
            wave.append(self._place(turn))
            new_tokens += len(turn.ids) - 1 - int(self._kv_R[wave[-1]])
        self._waiting.extendleft(reversed(deferred))
        return wave

    def _count_admissible(self) -> int:
        """How many turns at the head of the line fit; lays the slots out for them."""
        active = self._num_active
        if not self._waiting:
            return 0
        longest = self._longest_active()
        count = 0
        for turn in self._waiting:
            needed = max(longest, len(turn.ids))
            rows = active + count + 1
            if rows > self._max_batch or rows > self._max_slots(needed, rows):
                break
            longest, count = needed, count + 1
        if count and (active + count > len(self._turns) or longest > self._tokens_RW.shape[1]):
            self._lay_out(rows=active + count, tokens=longest)
        return count

    def _longest_active(self) -> int:
        return max((len(turn.ids) for turn in self._turns if turn is not None), default=0)

    def _width_for(self, tokens: int) -> int:
        """Least W for sequences of this length, with a little room to grow."""
        steps = -(-(tokens + _WIDTH_SPARE) // _WIDTH_STEP)
        return min(steps * _WIDTH_STEP, self._max_cache_tokens)

    def _max_slots(self, tokens: int, rows: int) -> int:
        """How many slots the budget allows if each must hold this many tokens."""
        width = self._tokens_RW.shape[1]
        if tokens <= width and rows <= len(self._turns):
            return len(self._turns)
        return max(self._max_cache_tokens // self._width_for(tokens), 1)

    def _place(self, turn: Turn) -> int:
        """Assign a slot that holds, or gets a copy of, the longest known prefix."""
        ids = np.array(turn.ids, dtype=np.int64)
        source, common = self._best_prefix(ids[:-1])
        if source is not None and self._turns[source] is None and common == self._kv_R[source]:
            slot = source
        else:
            slot = self._victim(keep=source)
            if source is not None and slot != source:
                self._runner.cache.copy([source], [slot], length=common)
                self._tokens_RW[slot, :common] = ids[:common]
        self._kv_R[slot] = common
        self._used_R[slot] = self._tick
        self._turns[slot] = turn
        self._num_active += 1
        self._batch = None
        if turn.order < 0:
            turn.order = self._admitted
            self._admitted += 1
            self._stats.cached_prompt_tokens += common
        return slot

    def _best_prefix(self, ids: NDArray[np.int64]) -> tuple[int | None, int]:
        """Return the slot that shares the longest prefix with ``ids``, and its length."""
        slots = np.flatnonzero(self._kv_R >= _MIN_REUSE)
        width = min(len(ids), self._tokens_RW.shape[1])
        if not len(slots) or width < _MIN_REUSE:
            return None, 0
        slots = slots[self._tokens_RW[slots, _MIN_REUSE - 1] == ids[_MIN_REUSE - 1]]
        differs = self._tokens_RW[slots, :width] != ids[:width]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        common = np.minimum(first, self._kv_R[slots])
        if not len(slots) or common.max() < _MIN_REUSE:
            return None, 0
        best = slots[common == common.max()]
        own = [s for s in best.tolist() if self._turns[s] is None and self._kv_R[s] == common.max()]
        return (own[0] if own else int(best[0])), int(common.max())

    def _victim(self, *, keep: int | None) -> int:
        """Return a slot to overwrite: an empty one, else the longest unused one."""
        open_slots = [s for s, turn in enumerate(self._turns) if turn is None and s != keep]
        if not open_slots:
            assert keep is not None  # at least one slot is open, so it is the source itself
            return keep
        return min(open_slots, key=lambda s: (self._kv_R[s] > 0, self._used_R[s], s))

    def _prefill(self, wave: list[int]) -> None:
        """Compute the missing keys of all but the last token of each newly placed sequence."""
        missing = {}
        for slot in wave:
            turn = self._turns[slot]
            assert turn is not None
            start = int(self._kv_R[slot])
            if new := turn.ids[start:-1]:
                missing[slot] = (start, new)
        for group in group_by_length(missing):
            self._runner.prefill(
                group,
                starts=[missing[slot][0] for slot in group],
                tokens=[missing[slot][1] for slot in group],
            )
        for slot, (start, new) in missing.items():
            self._tokens_RW[slot, start : start + len(new)] = new
            self._kv_R[slot] = start + len(new)

    # -- layout of the slots -----------------------------------------------------------------

    def _lay_out(self, *, rows: int, tokens: int) -> None:
        """Change R and W so that ``rows`` sequences of ``tokens`` fit, if the budget allows."""
        width = self._width_for(2 * tokens)
        if self._max_cache_tokens // width < rows:
            width = self._width_for(tokens)
        spare = 2 * (1 << (max(rows, 8) - 1).bit_length())
        num_slots = max(min(self._max_cache_tokens // width, spare, 2 * self._max_batch), 1)
        while self._num_active > num_slots:
            self._set_aside_newest()
        active = [s for s, turn in enumerate(self._turns) if turn is not None]
        idle = [s for s, turn in enumerate(self._turns) if turn is None and self._kv_R[s] > 0]
        idle.sort(key=lambda s: (-self._used_R[s], s))
        kept = (active + idle)[:num_slots]
        length = min(width, int(self._kv_R.max(initial=0)))
        if self._turns:
            self._runner.cache.resize(kept, num_slots=num_slots, width=width, length=length)
        else:
            self._runner.allocate(num_slots=num_slots, width=width)
        tokens_RW = np.zeros((num_slots, width), dtype=np.int64)
        tokens_RW[: len(kept), :length] = self._tokens_RW[kept, :length]
        pad = (0, num_slots - len(kept))
        self._turns = [self._turns[s] for s in kept] + [None] * pad[1]
        self._tokens_RW = tokens_RW
        self._kv_R = np.minimum(np.pad(self._kv_R[kept], pad), width)
        self._used_R = np.pad(self._used_R[kept], pad)
        self._batch = None

    def _set_aside_newest(self) -> None:
        """Return the newest turn to the head of the line; it resumes from what it has."""
        newest = max((t for t in self._turns if t is not None), key=lambda turn: turn.order)
        self._vacate(self._turns.index(newest))
        self._waiting.appendleft(newest)

    def _vacate(self, slot: int) -> None:
        """End a slot's turn, keeping its keys for whoever continues from them."""
        self._turns[slot] = None
        self._num_active -= 1
        self._used_R[slot] = self._tick
        self._batch = None

    def _make_room(self) -> None:
        """Widen the slots when the next token would not fit."""
        longest = int(self._kv_R[[turn is not None for turn in self._turns]].max()) + 1
        if longest > self._tokens_RW.shape[1]:
            self._lay_out(rows=self._num_active, tokens=longest)

    def _compact(self) -> None:
        """Move active sequences into slots 0 .. N-1, swapping with what was there."""
        active = self._num_active
        holes = [s for s in range(active) if self._turns[s] is None]
        if not holes:
            return
        outside = [s for s in range(active, len(self._turns)) if self._turns[s] is not None]
        order, swapped = holes + outside, outside + holes
        length = int(self._kv_R[order].max())
        self._runner.cache.copy(swapped, order, length=length)
        self._tokens_RW[order] = self._tokens_RW[swapped]
        self._kv_R[order] = self._kv_R[swapped]
        self._used_R[order] = self._used_R[swapped]
        for hole, out in zip(holes, outside, strict=True):
            self._turns[hole], self._turns[out] = self._turns[out], None
        self._batch = None

    # -- decoding ----------------------------------------------------------------------------

    def _decode(self) -> list[Turn]:
        """Sample one token for every active sequence; return the turns that end with it."""
        batch = self._batch = self._batch or Batch.of([t for t in self._turns if t is not None])
        rows = len(batch.turns)
        positions_N = self._kv_R[:rows].copy()
        self._tokens_RW[np.arange(rows), positions_N] = batch.last_N
        logits_NV = self._runner.decode(batch.last_N, positions_N)
        self._kv_R[:rows] += 1
        batch.extend(*sample(logits_NV, batch.sampling, positions_N + 1))
        self._stats.generated_tokens += rows
        finished = batch.ended(positions_N + 2)
        for slot in finished:
            self._vacate(slot)
        return [batch.turns[slot] for slot in finished]
