"""The start of the token head: two rows of the base's own language-model head."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trajectory.errors import InputError

_PROBE_TOKENS = 16
_TOLERANCE = 1e-3


def word_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[int]:
    """Return the token id of each word.

    Raises
    ------
    InputError
        If the tokenizer needs several tokens for a word, or has one token for two words.
    """
    ids = []
    for word in words:
        found = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise InputError(
                f"the token head needs words of one token each, and {word!r} is {len(found)} of "
                "this base: name two others with --head token:WRONG,RIGHT, or use --head binary"
            )
        ids.append(int(found[0]))
    if len(set(ids)) != len(ids):
        raise InputError(f"the base has the same token for the words {' and '.join(words)}")
    return ids


@torch.no_grad()
def start_from_words(
    model: PreTrainedModel, layer: nn.Linear, *, base: str | Path, ids: list[int]
) -> None:
    """Copy the language-model head's rows of some tokens into a classification layer.

    Parameters
    ----------
    model : PreTrainedModel
        The token classifier made from the base.
    layer : Linear
        Its classification layer, one class per id.
    base : str or Path
        Hub id or folder of a causal language model.
    ids : list of int
        Token ids, in class order.

    Raises
    ------
    InputError
        If the base has no language-model head, or its scores are not those rows alone (it caps or
        scales them, or transforms the hidden state first): checked on random tokens.
    """
    refusal = f"{base} cannot start a token head: "
    try:
        lm = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{refusal}it is no causal language model; use --head binary") from error
    lm.train(False)
    rows = lm.get_output_embeddings()
    if not isinstance(rows, nn.Linear):
        raise InputError(f"{refusal}it has no linear language-model head; use --head binary")
    layer.weight.copy_(rows.weight[ids])
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros(len(ids)) if rows.bias is None else rows.bias[ids])
    generator = torch.Generator().manual_seed(0)
    probe_BT = torch.randint(rows.weight.shape[0], (1, _PROBE_TOKENS), generator=generator)
    training = model.training
    model.train(False)
    ours, theirs = model(input_ids=probe_BT).logits, lm(input_ids=probe_BT).logits[..., ids]
    model.train(training)
    if (ours.softmax(-1) - theirs.softmax(-1)).abs().max() > _TOLERANCE:
        raise InputError(
            f"{refusal}its token scores are not a linear layer of its last hidden state; use "
            "--head binary"
        )
