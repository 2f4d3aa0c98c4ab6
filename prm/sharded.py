"""Weights that FSDP2 spreads over processes: gathered to be saved, cut up again to be loaded.

Gathering is a collective operation, so all processes call it, in the same order. What is saved is
the same as without sharding: a run may continue with another number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether any parameter is spread over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def cut_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Spread a whole tensor as another one is spread; as it is if that one is not."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def gather_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors on the CPU."""
    state = optimizer.state_dict()
    moments = {
        index: {k: gather(v) if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a state made of whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {
            k: cut_like(v, parameters[index])
            if isinstance(v, torch.Tensor) and v.shape == parameters[index].shape
            else v
            for k, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
