"""``python -m benchmarks small-base``: a small base to train reward models from on a CPU.

Either a new Llama with random weights and a byte-pair vocabulary learned from the training texts,
or the first layers of a larger model. Neither is a substitute for the whole model: a figure got
with one is a figure of that base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama import LlamaForCausalLM

from prm.model import quiet_transformers
from trajectory.atomic import atomic_folder
from trajectory.errors import InputError
from trajectory.step_formats import read_ratings

END = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class SmallBaseConfig:
    """Make a small base model."""

    out: Path
    """Folder of the base."""
    data: str | None = None
    """FORMAT:PATH whose texts the vocabulary of a new model is learned from."""
    first_layers_of: str | None = None
    """Hub id or folder of a Llama-like model to cut; instead of --data."""
    layers: int = 4
    hidden: int = 128
    """Width of a new model; a cut one keeps its own."""
    vocabulary: int = 4096
    """Tokens of a new model's vocabulary."""
    max_length: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.data is None) == (self.first_layers_of is None):
            raise InputError("give exactly one of --data and --first-layers-of")


def make(config: SmallBaseConfig) -> None:
    """Write the base's folder."""
    model: PreTrainedModel
    if config.first_layers_of is not None:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(config.first_layers_of)
            model = AutoModelForCausalLM.from_pretrained(
                config.first_layers_of,
                num_hidden_layers=config.layers,
                dtype=torch.float32,
            )
    else:
        tokenizer, model = _new(config)
    with atomic_folder(config.out) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    Console(highlight=False).print(
        f"{config.out}: {model.config.num_hidden_layers} layers, {size:,} weights, "
        f"{len(tokenizer)} tokens",
        soft_wrap=True,
    )


def _new(config: SmallBaseConfig) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Learn a vocabulary and draw weights."""
    assert config.data is not None
    texts = (
        text
        for row in read_ratings(config.data)
        for text in (
            row.trajectory.task.prompt,
            *(s.text for s in row.trajectory.steps),
            *(o.content for s in row.trajectory.steps for o in s.observations),
        )
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=max(1, config.hidden // 32),
            num_key_value_heads=max(1, config.hidden // 32),
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=wrapped.eos_token_id,
            pad_token_id=wrapped.pad_token_id,
        )
    )
    return wrapped, model
