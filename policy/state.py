"""Checkpoints of an optimization: all that a resumed run needs to equal an uninterrupted one.

One file per checkpoint, replaced as a whole, the last two kept. It holds the trained parameters,
the optimizer, the state of every random generator, the step and the tracker's run id. Tasks, seeds
and the learning rate are functions of the step, so they need no state.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trajectory.atomic import atomic_path
from trajectory.errors import InputError

STATE = "state"
KEPT = 2
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6})\.pt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """Where a run continues."""

    step: int
    """Optimization steps already done."""
    run_id: str
    """Tracker id of the run that was interrupted."""


def save_state(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run_id: str,
) -> Path:
    """Write a checkpoint and drop those older than the last two.

    Parameters
    ----------
    folder : Path
        Folder of checkpoints; created if missing.
    step : int
        Optimization steps done.
    model : nn.Module
        Its parameters that require a gradient are saved (an adapter's only, with LoRA).
    optimizer : Optimizer
        Saved whole.
    run_id : str
        The tracker's.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OSError, RuntimeError
        If the disk is full: the older checkpoints stay as they are.
    """
    content = {
        "format": _FORMAT,
        "step": step,
        "run_id": run_id,
        "parameters": {name: p.detach() for name, p in _trained(model)},
        "optimizer": optimizer.state_dict(),
        "random": _random_state(),
    }
    path = folder / f"step-{step:06d}.pt"
    with atomic_path(path) as temporary:
        torch.save(content, temporary)
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def restore_state(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Restored | None:
    """Load the newest checkpoint into the model and the optimizer, in place.

    Parameters
    ----------
    folder : Path
        As given to `save_state`.
    model : nn.Module
        Built exactly as for the interrupted run.
    optimizer : Optimizer
        Over the same parameters.

    Returns
    -------
    Restored or None
        None if there is no checkpoint: the run starts at step 0.

    Raises
    ------
    InputError
        If the file is of another format, or of another model.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("format") != _FORMAT:
        raise InputError(f"{path} has an unknown format: delete {folder} to start over")
    saved = content["parameters"]
    trained = dict(_trained(model))
    if {n: p.shape for n, p in trained.items()} != {n: p.shape for n, p in saved.items()}:
        raise InputError(f"{path} is a checkpoint of another model: delete {folder} to start over")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(content["optimizer"])
    _set_random_state(content["random"])
    return Restored(step=content["step"], run_id=content["run_id"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that the optimizer changes."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def _random_state() -> dict[str, Any]:
    """Return the state of all random generators, in types that load without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    """Put all random generators back."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
