"""Find out what a policy folder holds, and load it, or say in one sentence why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from agent.engines.base import EngineOptions
from trajectory.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_config(policy: str) -> PretrainedConfig:
    """Read a policy's configuration and make sure it is a causal language model.

    Parameters
    ----------
    policy : str
        Hub id or folder.

    Raises
    ------
    InputError
        If there is no such model, or it has no language-model head.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(policy)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{policy} is no model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or policy.startswith(".")):
        raise InputError(f"there is no model folder {policy}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(policy)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the policy {policy}: {_sentence(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{policy} is a {config.model_type} model, not a causal language model")
    heads = config.architectures or []
    if heads and not any("LM" in name or "ConditionalGeneration" in name for name in heads):
        raise InputError(
            f"{policy} holds a {heads[0]}, which has no language-model head; give a causal "
            "language model"
        )
    return config


def load_model(options: EngineOptions) -> PreTrainedModel:
    """Load the policy onto the device, in evaluation mode.

    Raises
    ------
    InputError
        As `load_config`; or if the weights are missing or broken, or there is no such device.
    """
    from transformers import AutoModelForCausalLM

    device = resolve_device(options.device)
    config = load_config(options.policy)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            options.policy,
            config=config,
            dtype=resolve_dtype(options.dtype, device),
            attn_implementation="sdpa",
        )
    except Exception as error:  # a broken file raises its reader's own exception
        raise InputError(f"cannot load the policy {options.policy}: {_sentence(error)}") from error
    nn.Module.to(model, device)
    model.eval()
    return model


def align_weights(model: nn.Module) -> None:
    """Move weights that lie at an odd address to one torch would have chosen.

    Parameters
    ----------
    model : nn.Module
        Changed in place; parameters stay the same objects, so optimizers and ties survive.

    Notes
    -----
    Weights read from a file are views into it at any address, and CPU matrix kernels round
    differently at other alignments: without this, a resumed run, whose weights come from a file,
    would differ in the last bits from one whose weights were always in memory.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the input embedding: its device and dtype stand for the model's."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def resolve_device(name: str) -> torch.device:
    """Resolve ``auto`` and refuse a device that is not there.

    Raises
    ------
    InputError
        If the name is unknown, or the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for, but this machine has no such GPU")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: float32 on a CPU, bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _sentence(error: Exception) -> str:
    """First paragraph of a library's message on one line."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
