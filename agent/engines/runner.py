"""Forward passes of a Hugging Face causal language model over a slot cache.

Dimension letters: N rows of one forward pass, T tokens per row, L cached tokens read, H query
heads, D head width, V vocabulary.

The model object may be shared with a trainer: a pass runs under `torch.inference_mode` in
evaluation mode, and leaves every module's training flag, every ``requires_grad`` and the model's
attention implementation as it found them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agent.engines.kv_cache import Plan, SlotCache
from agent.engines.loading import embedding_weight
from trajectory.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

_ATTENTION = "slots"


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,  # noqa: ANN401 - whatever the layer passes
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' ``sdpa`` does, without copying shared key-value heads at decoding.

    Parameters
    ----------
    module : nn.Module
        The attention layer that asks.
    query : tensor, shape (N, H, T, D)
    key, value : tensors, shape (N, H / G, L, D)
        G query heads share one key-value head.
    attention_mask : tensor or None, shape (N, 1, T, L)
        Added to the scores; None is causal.
    **kwargs
        What the layer passes to any attention function (``scaling`` ...).

    Returns
    -------
    tensor, shape (N, T, H, D)
    None

    Notes
    -----
    With one query token the G heads of a group are G queries over the same keys, so a reshape
    replaces the G-fold repetition of the whole cache.
    """
    num_rows, num_heads, num_tokens, _ = query.shape
    group = num_heads // key.shape[1]
    if num_tokens > 1 or group == 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(num_rows, key.shape[1], group, query.shape[3])
    attended = scaled_dot_product_attention(
        grouped,
        key,
        value,
        attn_mask=attention_mask,
        scale=kwargs.get("scaling"),
    )
    return attended.reshape(num_rows, 1, num_heads, value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, slot_attention)


class Runner:
    """A model and its slot cache.

    Parameters
    ----------
    model : PreTrainedModel
        Any decoder-only model with a causal language-model head and full attention.
    name : str
        What messages call the model.
    max_context : int
        Longest sequence that will be run, tokens.

    Raises
    ------
    InputError
        If the model cannot be served exactly; the sentence says why.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, max_context: int) -> None:
        self.model = model
        self.device = embedding_weight(model).device
        self.dtype = embedding_weight(model).dtype
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._cache: SlotCache | None = None
        _refuse_unservable(model, name=name, max_context=max_context)
        _check_against_model(self, name=name)

    def allocate(self, *, num_slots: int, width: int) -> None:
        """Make an empty cache; storage is claimed as it is written to."""
        layers = self.model.config.get_text_config().num_hidden_layers
        self._cache = SlotCache(layers, num_slots=num_slots, width=width, device=self.device)

    def release(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    @property
    def cache(self) -> SlotCache:
        """The slot cache; only after `allocate`."""
        if self._cache is None:
            raise RuntimeError("the runner has no cache: call allocate first")
        return self._cache

    def prefill(
        self, slots: Sequence[int], *, starts: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Compute the keys and values of tokens that follow what the slots hold.

        Parameters
        ----------
        slots : sequence of int, length N
            Distinct slots.
        starts : sequence of int, length N
            Tokens each slot already holds; all zero, or any mixture (slower).
        tokens : sequence of sequences of int, length N
            New ids of each row, at least one each; shorter rows are padded at the end, where
            nothing reads.
        """
        longest = max(len(row) for row in tokens)
        ids_NT = np.zeros((len(tokens), longest), dtype=np.int64)
        for i, row in enumerate(tokens):
            ids_NT[i, : len(row)] = row
        start_N1 = torch.tensor(starts, device=self.device)[:, None]
        positions_NT = start_N1 + torch.arange(longest, device=self.device)
        positions_NT.clamp_(max=self.cache.width - 1)  # padding only: no row is that long
        fresh = not any(starts)
        plan = Plan(
            kind="fresh" if fresh else "extend",
            slots_N=torch.tensor(slots, device=self.device),
            positions_NT=positions_NT,
            length=max(s + len(row) for s, row in zip(starts, tokens, strict=True)),
        )
        self._forward(ids_NT, plan, None if fresh else self._mask(plan))

    def decode(self, ids_N: NDArray[np.int64], positions_N: NDArray[np.int64]) -> torch.Tensor:
        """Feed one token to each of the slots ``0 .. N-1``.

        Parameters
        ----------
        ids_N : int64 array, shape (N,)
        positions_N : int64 array, shape (N,)
            Where each token lies in its slot.

        Returns
        -------
        tensor, shape (N, V)
            Logits of the following token.
        """
        plan = Plan(
            kind="decode",
            slots_N=torch.arange(len(ids_N), device=self.device),
            positions_NT=torch.from_numpy(positions_N)[:, None].to(self.device),
            length=int(positions_N.max()) + 1,
        )
        return self._forward(ids_N[:, None], plan, self._mask(plan))

    def _mask(self, plan: Plan) -> torch.Tensor:
        """Additive mask (N, 1, T, L) that hides every position after a token's own."""
        keys_L = torch.arange(plan.length, device=self.device)
        hidden_NTL = keys_L > plan.positions_NT[:, :, None]
        mask_NTL = torch.zeros(hidden_NTL.shape, dtype=self.dtype, device=self.device)
        return mask_NTL.masked_fill_(hidden_NTL, torch.finfo(self.dtype).min)[:, None]

    def _forward(
        self, ids_NT: NDArray[np.int64], plan: Plan, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the model on the cache; return the logits (N, V) after each row's last column."""
        self.cache.plan = plan
        with _serving(self.model):
            output = self.model(
                input_ids=torch.from_numpy(ids_NT).to(self.device),
                attention_mask=mask,
                position_ids=plan.positions_NT,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits


@contextmanager
def _serving(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation and inference mode with slot attention, then all back."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    for module in training:
        module.training = False
    model.config._attn_implementation = _ATTENTION
    try:
        with torch.inference_mode():
            yield
    finally:
        model.config._attn_implementation = attention
        for module in training:
            module.training = True


def _refuse_unservable(model: PreTrainedModel, *, name: str, max_context: int) -> None:
    """Refuse what the configuration already rules out."""
    config = model.config.get_text_config()
    advice = "use --engine vllm for it"
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder model; a decoder-only one is needed")
    parameters = inspect.signature(model.forward).parameters
    if "kwargs" not in parameters:
        for needed in ("position_ids", "past_key_values", "logits_to_keep"):
            if needed not in parameters:
                raise InputError(f"{name} takes no {needed}, which the engine needs; {advice}")
    types, settings = get_layer_types_and_kwargs(config)
    for kind, setting in zip(types, settings, strict=True):
        window = setting.get("sliding_window", max_context)
        if kind not in ("full_attention", "sliding_attention") or window < max_context:
            raise InputError(
                f"{name} has {kind.replace('_', ' ')} layers"
                + (f" of {window} tokens, less than max_context {max_context}" if setting else "")
                + f", which the transformers engine does not serve; {advice}"
            )


def _check_against_model(runner: Runner, *, name: str) -> None:
    """Refuse a model whose cached passes do not reproduce its plain forward pass."""
    ids = [(7 * i + 3) % runner.vocabulary for i in range(12)]
    training = [module for module in runner.model.modules() if module.training]
    for module in training:
        module.training = False
    with torch.inference_mode():
        plain_TV = runner.model(torch.tensor([ids], device=runner.device)).logits[0].float()
    for module in training:
        module.training = True
    runner.allocate(num_slots=2, width=16)
    runner.prefill([0], starts=[0], tokens=[ids[:5]])
    runner.prefill([1, 0], starts=[0, 5], tokens=[ids[:8], ids[5:8]])
    rows = np.array([ids[8:], ids[8:]])
    cached_TNV = torch.stack(
        [runner.decode(rows[:, i], np.array([8 + i, 8 + i])).float() for i in range(4)]
    )
    runner.release()
    tolerance = 1e-3 if runner.dtype == torch.float32 else 0.1
    scale = plain_TV.abs().max().clamp(min=1.0)
    error = ((cached_TNV - plain_TV[8:, None]).abs().max() / scale).item()
    if not error <= tolerance:
        raise InputError(
            f"{name} cannot be served by the transformers engine: its logits with a key-value "
            f"cache differ from its plain forward pass by {error:.2g} (relative); use --engine "
            "vllm for it"
        )
