"""Checkpoints of a warm-up, and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
"""Subfolder of the run folder."""


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C so that a step is never left half done; a second one ends at once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, remember)
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, before)


def list_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """List complete checkpoints with their step, oldest first."""
    folders = (out / CHECKPOINTS).glob("step-*")
    return sorted((int(folder.name.removeprefix("step-")), folder) for folder in folders)


def save_checkpoint(out: Path, accelerator: Accelerator, *, step: int) -> None:
    """Save the state under a new name, then remove the older ones."""
    older = list_checkpoints(out)
    staged = out / CHECKPOINTS / f".step-{step}"
    # Tied weights are one tensor; the default format would refuse or drop the second name.
    accelerator.save_state(str(staged), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(staged, staged.with_name(f"step-{step}"))
        for _, folder in older:
            shutil.rmtree(folder)
