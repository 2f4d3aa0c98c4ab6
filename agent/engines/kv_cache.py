"""A key-value cache of slots that is written in place.

Dimension letters: R slots, W tokens a slot can hold, H key-value heads, D head width; within one
forward N rows, L cached tokens read, T tokens written per row.

Slot ``r`` holds one sequence left-aligned: token ``t`` lies at ``[r, :, t]``. Three kinds of
forward pass use the cache, told apart by the `Plan` set before the call:

- *fresh*: whole prompts into empty slots; attention needs nothing from the cache;
- *extend*: tokens after a prefix that is already in each slot;
- *decode*: one token for each of slots ``0 .. N-1``; attention reads a view, nothing is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(kw_only=True, slots=True)
class Plan:
    """Where one forward pass writes, and what its attention reads."""

    kind: Literal["fresh", "extend", "decode"]
    slots_N: torch.Tensor
    """Slot of each row; for ``decode`` 0, 1, ... N-1."""
    positions_NT: torch.Tensor
    """Position within its slot of every token written."""
    length: int
    """L: tokens per slot that attention reads."""
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """Per number of heads: flat indices of the (slot, head, position) rows written."""

    def flat_rows(self, heads: int, width: int) -> torch.Tensor:
        """Return the indices into a ``(R * H * W, D)`` view, in (N, H, T) order."""
        if heads not in self.rows:
            device = self.slots_N.device
            heads_NH = self.slots_N[:, None] * heads + torch.arange(heads, device=device)
            self.rows[heads] = (heads_NH[:, :, None] * width + self.positions_NT[:, None]).flatten()
        return self.rows[heads]


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros that on a CPU cost neither time nor memory until they are touched.

    Attention reads positions that were never written and masks them, which needs them finite;
    `torch.zeros` would write them all. The start is 64-byte aligned, as torch's own allocations
    are, because matrix kernels may round differently at other alignments.

    Examples
    --------
    >>> lazy_zeros((2, 3), dtype=torch.float32, device=torch.device("cpu")).sum().item()
    0.0
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, shape (R, H, W, D) each, allocated at the first write."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate; heads, widths and dtype are those of the first states seen."""
        self.keys = self._empty(key_states)
        self.values = self._empty(value_states)
        self.is_initialized = True

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        """Zeroed storage for states of this kind."""
        shape = (self._cache.num_slots, like.shape[1], self._cache.width, like.shape[3])
        return lazy_zeros(shape, dtype=like.dtype, device=like.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states where the plan says and return what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        plan = self._cache.plan
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            rows = plan.flat_rows(states.shape[1], self._cache.width)
            store.view(-1, store.shape[3]).index_copy_(0, rows, states.reshape(-1, store.shape[3]))
        if plan.kind == "fresh":
            return key_states, value_states
        if plan.kind == "extend":
            keys, values = self.keys[:, :, : plan.length], self.values[:, :, : plan.length]
            return keys.index_select(0, plan.slots_N), values.index_select(0, plan.slots_N)
        rows_read = len(plan.slots_N)
        return self.keys[:rows_read, :, : plan.length], self.values[:rows_read, :, : plan.length]

    def copy_slots(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of some slots over others."""
        for store in (self.keys, self.values):
            if store is not None:
                view = store[:, :, :length]
                view[targets] = view[sources]

    def resize(self, kept: torch.Tensor, length: int) -> None:
        """Reallocate at the cache's present shape; slot ``kept[i]`` becomes slot ``i``."""
        if self.keys is None or self.values is None:
            return
        old = (self.keys, self.values)
        self.keys, self.values = self._empty(old[0]), self._empty(old[1])
        for store, new in zip(old, (self.keys, self.values), strict=True):
            new[: len(kept), :, :length] = store[:, :, :length][kept]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys read, offset of the first one)."""
        return (query_length if self._cache.plan.kind == "fresh" else self._cache.plan.length), 0

    def get_seq_length(self) -> int:
        """Return 0: positions are always given, so none has to be derived from the cache."""
        return 0

    def get_max_length(self) -> int:
        """Return W."""
        return self._cache.width


class SlotCache(Cache):
    """Slots for the sequences of a continuously changing batch.

    Parameters
    ----------
    num_layers : int
        Attention layers of the model.
    num_slots : int
        R.
    width : int
        W, tokens; memory is ``R * W`` tokens in every layer.
    device : torch.device
        Where index tensors live.
    """

    def __init__(
        self, num_layers: int, *, num_slots: int, width: int, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.width = width
        self.device = device
        self.plan = Plan(
            kind="fresh",
            slots_N=torch.zeros(0, dtype=torch.long),
            positions_NT=torch.zeros((0, 0), dtype=torch.long),
            length=0,
        )
        self._slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._slot_layers))

    @torch.inference_mode()
    def copy(self, sources: list[int], targets: list[int], *, length: int) -> None:
        """Copy the first ``length`` tokens of each source slot to its target, all at once.

        Sources are read before targets are written, so a swap is one call.
        """
        source = torch.tensor(sources, device=self.device)
        target = torch.tensor(targets, device=self.device)
        for layer in self._slot_layers:
            layer.copy_slots(source, target, length)

    @torch.inference_mode()
    def resize(self, kept: list[int], *, num_slots: int, width: int, length: int) -> None:
        """Change the shape, one layer at a time; slot ``kept[i]`` becomes slot ``i``.

        Parameters
        ----------
        kept : list of int
            Slots whose content survives, in their new order.
        num_slots, width : int
            The new R and W.
        length : int
            Tokens per slot worth copying, at most the smaller width.
        """
        self.num_slots, self.width = num_slots, width
        kept_N = torch.tensor(kept, dtype=torch.long, device=self.device)
        for layer in self._slot_layers:
            layer.resize(kept_N, length)
