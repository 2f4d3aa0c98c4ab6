"""The network: a reward model made from any base model, and its forward at scored positions.

A new reward model is the base's own ``*ForTokenClassification`` class with a fresh linear head
whose bias starts at the base rate, so training begins from the best constant prediction; the token
head begins with rows of the base's language-model head instead (`prm.words`), and the implicit
head is a pair of language models without such a layer (`prm.implicit`). With LoRA, adapters sit on
every linear layer of the body and the head is trained in full; merging gives back an ordinary model
of the same class.

Dimension letters beside the project's own: P scored positions, C classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prm.data import Batch
from prm.heads import Head
from prm.implicit import ImplicitModel, start_implicit
from prm.words import start_from_words, word_ids
from trajectory.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
Network = PreTrainedModel | ImplicitModel
"""What scores: a token classifier, or the pair of language models of the implicit head."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notices; what matters is checked here instead."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def open_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer; a missing padding token becomes the end-of-sequence token.

    Raises
    ------
    InputError
        If there is no tokenizer, or neither a padding nor an end-of-sequence token.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(base))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{base} has no tokenizer that loads: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) == 0:
        raise InputError(f"{base} has no tokenizer: give a model folder that holds one")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {base} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_model(base: str | Path, head: Head, *, base_rate: float, seed: int) -> Network:
    """Make a reward model from a base model.

    Parameters
    ----------
    base : str or Path
        Hub id or folder of a causal language model or an encoder.
    head : Head
        Decides the number of classes.
    base_rate : float
        Mean training target; the initial prediction everywhere, unless the head begins with words
        of the base.
    seed : int
        Of the head's initial weights.

    Returns
    -------
    Network
        In float32 on the CPU.

    Raises
    ------
    InputError
        If the base does not load, its architecture has no token classifier, it does not know
        the head's words as tokens, or the head needs a causal language model and it is none.
    """
    config = open_config(base)
    if head.beta is not None:
        with quiet_transformers():
            pair = start_implicit(base, beta=head.beta, base_log_odds=_log_odds(base_rate))
        _check_vocabulary(pair.reference, base)
        return pair
    config.id2label = dict(enumerate(head.classes))
    config.label2id = {name: i for i, name in enumerate(head.classes)}
    config.classifier_dropout = 0.0  # a random mask before the head only adds noise
    try:
        with quiet_transformers():
            model, report = AutoModelForTokenClassification.from_pretrained(
                str(base), config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{base} does not load as a token classifier: {_first_line(error)}"
        ) from error
    name = head_name(model)
    strange = sorted(k for k in report["missing_keys"] if not k.startswith(f"{name}."))
    if strange:
        raise InputError(f"{base} lacks weights its configuration asks for, such as {strange[0]}")
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    _check_vocabulary(model, base)
    assert isinstance(model, PreTrainedModel)
    if head.words:
        ids = word_ids(open_tokenizer(base), head.classes)
        with quiet_transformers():
            start_from_words(model, layer, base=base, ids=ids)
    else:
        _start_at_base_rate(layer, base_rate, seed)
    return model


def embedding_rows(model: PreTrainedModel) -> int:
    """Count the token ids a model embeds."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _check_vocabulary(model: PreTrainedModel, base: str | Path) -> None:
    """Refuse a base whose embedding is smaller than its tokenizer."""
    tokens, rows = len(open_tokenizer(base)), embedding_rows(model)
    if tokens > rows:
        raise InputError(
            f"the tokenizer of {base} has {tokens} tokens but the model embeds only {rows}"
        )


def head_name(model: nn.Module) -> str:
    """Return the attribute that holds the classification layer."""
    for name in ("score", "classifier"):
        if isinstance(getattr(model, name, None), nn.Linear):
            return name
    raise InputError(f"{type(model).__name__} has no linear classification layer to train")


@torch.no_grad()
def _start_at_base_rate(layer: nn.Linear, base_rate: float, seed: int) -> None:
    """Draw small weights and set the bias so that every initial prediction is the base rate."""
    generator = torch.Generator().manual_seed(seed)
    std = 0.02 / math.sqrt(layer.in_features)  # hidden states have norm about sqrt(D)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * std)
    if layer.bias is not None:
        layer.bias.zero_()
        layer.bias[-1] = _log_odds(base_rate)


def _log_odds(rate: float) -> float:
    """Return the log-odds of a rate, kept away from 0 and 1."""
    rate = min(max(rate, 0.01), 0.99)
    return math.log(rate / (1 - rate))


def add_lora(model: Network, *, rank: int, seed: int) -> nn.Module:
    """Freeze the body and put rank-``rank`` adapters on its linear layers; the head stays free.

    Of a pair of language models only the trained one gets adapters, and nothing else is trained.

    Notes
    -----
    ``W + (alpha / r) B A`` with ``alpha = 2 r`` (Hu et al., arXiv:2106.09685, section 4.1).
    """
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    pair = model if isinstance(model, ImplicitModel) else None
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS if pair is None else TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=[head_name(model)] if pair is None else None,
    )
    adapted = get_peft_model(model if pair is None else pair.policy, config)
    assert isinstance(adapted, nn.Module)
    if pair is None:
        return adapted
    pair.policy = adapted
    return pair.train(False)  # peft switches its own wrapper to training mode


def merge_lora(model: nn.Module) -> Network:
    """Fold adapters into the weights; a model without adapters is returned as it is."""
    from peft import PeftModel

    if isinstance(model, ImplicitModel):
        model.policy = merge_lora(model.policy)
        return model
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    assert isinstance(merged, PreTrainedModel)
    return merged


def num_trainable(model: nn.Module) -> int:
    """Count trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pick_device(device: str) -> torch.device:
    """Resolve ``auto`` to the GPU if there is one.

    Raises
    ------
    InputError
        If the device does not exist.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    if device.startswith("cuda") and not available:
        raise InputError(f"device {device!r} is not available: use --device cpu")
    return torch.device(device)


def logits_at(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run one forward and return the logits at the scored positions.

    Parameters
    ----------
    model : Module
        What `new_model` makes.
    batch : Batch
        On the model's device.

    Returns
    -------
    Tensor, shape (P, C)
        In float32.
    """
    asked = {} if batch.written_BT is None else {"written": batch.written_BT}
    if batch.parents_T is not None:
        asked["parents"] = batch.parents_T
    if batch.position_ids_BT is not None:
        ancestors_TT = batch.ancestors_TT
        output = model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=None if ancestors_TT is None else ancestors_TT[None, None],
            use_cache=False,  # with a cache, transformers does not look for packed rows
            **asked,
        )
    else:
        padded = not bool(batch.attention_mask_BT.all())
        output = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT if padded else None,
            **asked,
        )
    lines_P = batch.rows_P if batch.lines_P is None else batch.lines_P
    logits_PC: torch.Tensor = output.logits[lines_P, batch.columns_P]
    return logits_PC.float()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: t.to(device) for n, t in tensors.items() if t is not None})


def open_config(base: str | Path) -> PretrainedConfig:
    """Load a base's configuration.

    Raises
    ------
    InputError
        If there is none.
    """
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError) as error:
        raise InputError(f"{base} is not a model that loads: {_first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def autocast(device: torch.device, bfloat16: bool) -> AbstractContextManager[Any]:
    """Compute forwards in bfloat16 if asked to; weights and gradients stay as they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most tokens a model takes, if its configuration says."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
