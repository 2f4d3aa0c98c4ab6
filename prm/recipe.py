"""Settings of training that most runs leave alone: a first stage, packing, calibration."""

from __future__ import annotations

from dataclasses import dataclass

from prm.calibrate import Method
from prm.layout import Packing
from trajectory.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How training is done beyond its usual course."""

    head_first: int = 0
    """Epochs that train the classification layer alone, before the others; 0 has no such stage."""
    packing: Packing = "none"
    """What a forward pass reads: none pads rows to the longest, rows puts short ones beside each
    other instead, prefixes reads once what several trajectories of a task begin with in common.
    For decoders; a base that would mix them is refused."""
    calibration: Method = "platt"
    """Fitted on the held-out part: platt keeps the ranking of scores, isotonic bends more but may
    make scores equal, none leaves them as they are."""

    def __post_init__(self) -> None:
        if self.head_first < 0:
            raise InputError("--head-first must not be negative")
