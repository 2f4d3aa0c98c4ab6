"""The network of the implicit head: how much likelier training made the tokens that were written.

``logit of prefix t = b + beta sum_j [log pi(x_j | x_<j) - log pi_ref(x_j | x_<j)]``

over the tokens ``x_j`` of the actions of steps 1..t (ImplicitPRM, arXiv:2412.01981, equation 3;
PRIME, arXiv:2502.01456, trains it online). ``pi`` is a causal language model that is trained,
``pi_ref`` the base as it was, ``b`` the log-odds of the base rate. Both begin equal, so the first
prediction is the base rate everywhere. An action is its whole segment of the template, marker
included (`prm.rendering`); tokens of the task and of observations are read and never counted, so
the logit moves on actions alone.

Dimension letters beside the project's own: N tokens whose probability is asked for, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

from trajectory.errors import InputError

REFERENCE = "reference"
"""Subfolder of a checkpoint that holds the reference; the trained model lies in the folder."""
_PROBE = 16
"""Tokens on which a model shows whether it looks ahead."""
_TOLERANCE = 1e-4
"""Largest difference that rounding may make, of the largest logit; models are in float32."""


@dataclass(kw_only=True, slots=True, eq=False)
class PairCache:
    """What was computed of a text that goes on: for both models, and the sum so far."""

    policy: Cache
    reference: Cache
    ratios_BV: torch.Tensor | None = None
    """Log-ratio of every token that may come next; None before the first one was read."""
    sum_B: torch.Tensor | None = None
    """Of the log-ratios of the written tokens read so far, in float64."""

    def advance(
        self,
        ratios_BT: torch.Tensor,
        input_ids: torch.Tensor,
        *,
        written: torch.Tensor,
        next_BV: torch.Tensor,
    ) -> torch.Tensor:
        """Add the log-ratios of tokens just read; gives the sum up to each, shape (B, T).

        Of the first of them it was known before, from what preceded; ``next_BV`` is what is kept
        for the token after the last.
        """
        if self.ratios_BV is not None:
            first_B1 = self.ratios_BV.gather(1, input_ids[:, :1])
            ratios_BT = torch.cat([first_B1, ratios_BT[:, 1:]], dim=1)
        sums_BT = running_sums(ratios_BT.where(written, 0.0), None)
        if self.sum_B is not None:
            sums_BT = sums_BT + self.sum_B[:, None]
        self.sum_B, self.ratios_BV = sums_BT[:, -1], next_BV
        return sums_BT


class ImplicitModel(nn.Module):
    """A pair of language models whose log-ratio, summed over an agent's own tokens, is the logit.

    Parameters
    ----------
    policy : PreTrainedModel
        A causal language model, trained; with adapters of `peft` or without.
    reference : PreTrainedModel
        The same before training; frozen here.
    beta : float
        Weight of the log-ratio, > 0.
    base_log_odds : float
        Logit where nothing is written yet.

    Notes
    -----
    Both models stay in evaluation mode: dropout would make them differ where nothing was learned.
    """

    def __init__(
        self,
        *,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        beta: float,
        base_log_odds: float,
    ) -> None:
        super().__init__()
        self.policy: nn.Module = policy
        self.reference = reference.requires_grad_(False)
        self.beta, self.base_log_odds = beta, base_log_odds
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the base."""
        config = self.reference.config
        assert isinstance(config, PretrainedConfig)
        return config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.reference.device

    @property
    def _no_split_modules(self) -> list[str]:
        """Layers that FSDP shards one by one, where its settings name none."""
        return list(self.reference._no_split_modules or ())

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        written: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: PairCache | None = None,
        use_cache: bool = False,
    ) -> TokenClassifierOutput:
        """Compute the logit after every token.

        Parameters
        ----------
        input_ids : Tensor, shape (B, T)
            Padded on the right.
        written : Tensor of bool, shape (B, T)
            True on the tokens that the agent wrote; never on the first of a row.
        attention_mask : Tensor, shape (B, T), optional
            1 on real tokens; None where all are.
        position_ids : Tensor, shape (B, T), optional
            Where packed rows begin: 0 at the first token of each. The sum starts anew there.
        past_key_values : PairCache, optional
            What was read of these rows before; it grows. Not together with packing.
        use_cache : bool, default=False
            Must be True with a cache.

        Returns
        -------
        TokenClassifierOutput
            With ``logits`` of shape (B, T, 1), in float32.
        """
        cache = past_key_values
        assert use_cache == (cache is not None)
        # Only where a written token follows are logits over the vocabulary needed.
        columns_N = written[:, 1:].any(dim=0).nonzero()[:, 0]
        last = columns_N.new_full((1 if use_cache else 0,), input_ids.shape[1] - 1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logits_to_keep": torch.cat([columns_N, last]),
        }
        policy_BNV, reference_BNV = self._run_both(inputs, cache)
        following_BN, count = input_ids[:, columns_N + 1], len(columns_N)
        ratios_BN = log_probs_of(policy_BNV[:, :count], following_BN)
        ratios_BN = ratios_BN - log_probs_of(reference_BNV[:, :count], following_BN)
        ratios_BT = ratios_BN.new_zeros(input_ids.shape).index_copy(1, columns_N + 1, ratios_BN)
        if cache is None:
            sums_BT = running_sums(ratios_BT.where(written, 0.0), position_ids)
        else:
            next_BV = policy_BNV[:, -1].float().log_softmax(-1)
            next_BV = next_BV - reference_BNV[:, -1].float().log_softmax(-1)
            sums_BT = cache.advance(ratios_BT, input_ids, written=written, next_BV=next_BV)
        logits_BT = self.base_log_odds + self.beta * sums_BT
        logits_BT1 = cast(torch.FloatTensor, logits_BT.float()[..., None])
        return TokenClassifierOutput(logits=logits_BT1)

    def _run_both(
        self, inputs: dict[str, torch.Tensor | None], cache: PairCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both models' logits, of the reference without gradients."""
        given: dict[str, Any] = {name: t for name, t in inputs.items() if t is not None}
        given["use_cache"] = cache is not None  # else transformers does not look for packed rows
        continued = {} if cache is None else {"past_key_values": cache.reference}
        with torch.no_grad():
            reference_BNV: torch.Tensor = self.reference(**given, **continued).logits
        continued = {} if cache is None else {"past_key_values": cache.policy}
        policy_BNV: torch.Tensor = self.policy(**given, **continued).logits
        return policy_BNV, reference_BNV

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained model to a folder, without adapters, and the reference below it."""
        assert isinstance(self.policy, PreTrainedModel)
        self.policy.save_pretrained(folder)
        self.reference.save_pretrained(Path(folder) / REFERENCE)


def log_probs_of(logits_BNV: torch.Tensor, ids_BN: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of one token per row of logits.

    Parameters
    ----------
    logits_BNV : Tensor, shape (B, N, V)
        Of any number format.
    ids_BN : Tensor of int, shape (B, N)
        The tokens.

    Returns
    -------
    Tensor, shape (B, N)
        In nats, float32.

    Notes
    -----
    ``logit - logsumexp(logits)``: no array of all log-probabilities is made, and backward keeps
    the logits alone.
    """
    logits_BNV = logits_BNV.float()  # a sum of many small differences needs more than bfloat16
    chosen_BN = logits_BNV.gather(-1, ids_BN[..., None])[..., 0]
    return chosen_BN - logits_BNV.logsumexp(-1)


def running_sums(values_BT: torch.Tensor, position_ids_BT: torch.Tensor | None) -> torch.Tensor:
    """Sum up to every token, from the beginning of its own row.

    Parameters
    ----------
    values_BT : Tensor, shape (B, T)
        What is summed.
    position_ids_BT : Tensor of int, shape (B, T), optional
        0 where a row begins; None where every line is one row.

    Returns
    -------
    Tensor, shape (B, T)
        In float64, so that what is packed before a row leaves no rounding in it.

    Examples
    --------
    >>> values, places = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 1, 0, 1]])
    >>> running_sums(values, None).tolist(), running_sums(values, places).tolist()
    ([[1.0, 3.0, 7.0, 15.0]], [[1.0, 3.0, 4.0, 12.0]])
    """
    values_BT = values_BT.double()
    sums_BT = values_BT.cumsum(dim=1)
    if position_ids_BT is None:
        return sums_BT
    columns_T = torch.arange(values_BT.shape[1], device=values_BT.device)
    begins_BT = columns_T.where(position_ids_BT == 0, 0).cummax(dim=1).values
    return sums_BT - (sums_BT - values_BT).gather(1, begins_BT)


def start_implicit(base: str | Path, *, beta: float, base_log_odds: float) -> ImplicitModel:
    """Make the pair from a base, twice the same model.

    Parameters
    ----------
    base : str or Path
        Hub id or folder of a causal language model.
    beta, base_log_odds : float
        As in `ImplicitModel`.

    Returns
    -------
    ImplicitModel
        In float32 on the CPU.

    Raises
    ------
    InputError
        If the base is no causal language model with weights for its language-model head.
    """
    refusal = f"{base} cannot start the implicit head: "
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(base), dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{refusal}it is no causal language model; use --head value") from error
    policy, report = loaded
    assert isinstance(policy, PreTrainedModel)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{refusal}it lacks weights of a language model, such as {missing[0]}; use --head value"
        )
    policy.train(False)
    if not _is_causal(policy):
        raise InputError(
            f"{refusal}{type(policy).__name__} is no causal language model (its prediction of a "
            "token depends on later ones); use --head value"
        )
    # How to sample is no part of a reward model, and settings that no longer pass stop a save.
    policy.generation_config = GenerationConfig.from_model_config(policy.config)
    return ImplicitModel(
        policy=policy, reference=copy.deepcopy(policy), beta=beta, base_log_odds=base_log_odds
    )


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Tell, by trying, whether a token's logits are the same before and after the text goes on."""
    generator = torch.Generator().manual_seed(0)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    ids_BT = torch.randint(weight.shape[0], (1, _PROBE), generator=generator)
    kept = torch.arange(_PROBE // 2)
    whole = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits
    alone = model(input_ids=ids_BT[:, : len(kept)], use_cache=False).logits
    difference = float((whole - alone).abs().max()) if whole.shape == alone.shape else math.inf
    return difference <= _TOLERANCE * float(alone.abs().max())
