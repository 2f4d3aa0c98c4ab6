"""The network of the implicit head: how much likelier training made the tokens that were written.

``logit of prefix t = b + beta sum_j [log pi(x_j | x_<j) - log pi_ref(x_j | x_<j)]``

over the tokens ``x_j`` of the actions of steps 1..t (ImplicitPRM, arXiv:2412.01981, equation 3;
PRIME, arXiv:2502.01456, trains it online). ``pi`` is a causal language model that is trained,
``pi_ref`` the base as it was, ``b`` the log-odds of the base rate. Both begin equal, so the first
prediction is the base rate everywhere. An action is its whole segment of the template, marker
included (`prm.rendering`); tokens of the task and of observations are read and never counted, so
the logit moves on actions alone.

Dimension letters beside the project's own: N tokens whose probability is asked for, K tokens that
they follow, V vocabulary.
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

    def look_up(self, ids_B1: torch.Tensor) -> torch.Tensor:
        """Return the log-ratio of tokens that come next; 0 of the first, which nothing predicts."""
        if self.ratios_BV is None:
            return torch.zeros(ids_B1.shape, device=ids_B1.device)
        return self.ratios_BV.gather(1, ids_B1)

    def add(self, sums_BT: torch.Tensor) -> torch.Tensor:
        """Add what was summed before to the sums of the tokens just read."""
        if self.sum_B is not None:
            sums_BT = sums_BT + self.sum_B[:, None]
        self.sum_B = sums_BT[:, -1]
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

    def tie_weights(self) -> None:
        """Share the weights that either model shares within itself, after they were replaced.

        Accelerate asks for it, when it has moved a model to the meta device to shard it.
        """
        for part in (self.policy, self.reference):
            cast(PreTrainedModel, part).tie_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        written: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
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
        attention_mask : Tensor, shape (B, T) or (1, 1, T, T), optional
            1 on real tokens, or True on what each token sees; None where all are real.
        position_ids : Tensor, shape (B, T), optional
            Where packed rows begin: 0 at the first token of each. The sum starts anew there.
        parents : Tensor of int, shape (T,), optional
            Index of the token that each token of a single line follows, -1 where a row begins,
            where rows share their prefixes (`prm.prefix_tree`); by default the one before it.
        past_key_values : PairCache, optional
            What was read of these rows before; it grows. Not together with packing.
        use_cache : bool, default=False
            Must be True with a cache.

        Returns
        -------
        TokenClassifierOutput
            With ``logits`` of shape (B, T, 1), in float32.
        """
        assert use_cache == (past_key_values is not None)
        parents_T = torch.arange(-1, input_ids.shape[1] - 1, device=input_ids.device)
        parents_T = parents_T if parents is None else parents
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        ratios_BT = self._log_ratios(given, written, parents_T, past_key_values)
        parents_BT = parents_T.expand_as(input_ids)
        if position_ids is not None:
            parents_BT = parents_BT.where(position_ids != 0, -1)
        sums_BT = running_sums(ratios_BT.where(written, 0.0), parents_BT)
        if past_key_values is not None:
            sums_BT = past_key_values.add(sums_BT)
        logits_BT = self.base_log_odds + self.beta * sums_BT
        logits_BT1 = cast(torch.FloatTensor, logits_BT.float()[..., None])
        return TokenClassifierOutput(logits=logits_BT1)

    def _log_ratios(
        self,
        given: dict[str, torch.Tensor | None],
        written: torch.Tensor,
        parents_T: torch.Tensor,
        cache: PairCache | None,
    ) -> torch.Tensor:
        """Compute the log-ratio of every written token, shape (B, T); others have anything."""
        input_ids = given["input_ids"]
        assert input_ids is not None
        # Only where a written token follows are logits over the vocabulary needed. What follows
        # the last token may come later, and the first one may have been predicted before.
        begin = 0 if cache is None else 1
        columns_N = written[:, begin:].any(dim=0).nonzero()[:, 0] + begin
        sources_K, of_N = parents_T[columns_N].unique(return_inverse=True)
        last = columns_N.new_full((begin,), len(parents_T) - 1)
        kept_K = torch.cat([sources_K, last])
        policy_BKV, reference_BKV = self._run_both({**given, "logits_to_keep": kept_K}, cache)
        ids_BN = input_ids[:, columns_N]
        ratios_BN = log_probs_of(policy_BKV, ids_BN, of_N)
        ratios_BN = ratios_BN - log_probs_of(reference_BKV, ids_BN, of_N)
        ratios_BT = ratios_BN.new_zeros(input_ids.shape).index_copy(1, columns_N, ratios_BN)
        if cache is None:
            return ratios_BT
        ends = [logits_BKV[:, -1].float() for logits_BKV in (policy_BKV, reference_BKV)]
        first_B1 = cache.look_up(input_ids[:, :1])
        cache.ratios_BV = ends[0].log_softmax(-1) - ends[1].log_softmax(-1)
        return torch.cat([first_B1, ratios_BT[:, 1:]], dim=1)

    def _run_both(
        self, inputs: dict[str, torch.Tensor | None], cache: PairCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both models' logits, of the reference without gradients."""
        given: dict[str, Any] = {name: t for name, t in inputs.items() if t is not None}
        given["use_cache"] = cache is not None  # else transformers does not look for packed rows
        continued = {} if cache is None else {"past_key_values": cache.reference}
        with torch.no_grad():
            reference_BKV: torch.Tensor = self.reference(**given, **continued).logits
        continued = {} if cache is None else {"past_key_values": cache.policy}
        policy_BKV: torch.Tensor = self.policy(**given, **continued).logits
        return policy_BKV, reference_BKV

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained model to a folder, without adapters, and the reference below it."""
        assert isinstance(self.policy, PreTrainedModel)
        self.policy.save_pretrained(folder)
        self.reference.save_pretrained(Path(folder) / REFERENCE)


def plain_network(model: nn.Module) -> nn.Module:
    """Return what properties of a model's base are tried on: of a pair the reference.

    Before training the pair predicts the same everywhere, which would hide any property.
    """
    return model.reference if isinstance(model, ImplicitModel) else model


def log_probs_of(
    logits_BKV: torch.Tensor, ids_BN: torch.Tensor, sources_N: torch.Tensor
) -> torch.Tensor:
    """Return the log-probabilities of tokens.

    Parameters
    ----------
    logits_BKV : Tensor, shape (B, K, V)
        Of any number format.
    ids_BN : Tensor of int, shape (B, N)
        The tokens.
    sources_N : Tensor of int, shape (N,)
        Which of the K each of them is predicted by.

    Returns
    -------
    Tensor, shape (B, N)
        In nats, float32.

    Notes
    -----
    ``logit - logsumexp(logits)``: no array of all log-probabilities is made, and backward keeps
    the logits alone.
    """
    logits_BKV = logits_BKV.float()  # a sum of many small differences needs more than bfloat16
    places_BN = sources_N * logits_BKV.shape[-1] + ids_BN
    chosen_BN = logits_BKV.flatten(1).gather(1, places_BN)
    return chosen_BN - logits_BKV.logsumexp(-1)[:, sources_N]


def running_sums(values_BT: torch.Tensor, parents_BT: torch.Tensor) -> torch.Tensor:
    """Sum up to every token, from the beginning of its own row.

    Parameters
    ----------
    values_BT : Tensor, shape (B, T)
        What is summed.
    parents_BT : Tensor of int, shape (B, T)
        Index of the token that each follows; -1 where a row begins.

    Returns
    -------
    Tensor, shape (B, T)
        In float64.

    Notes
    -----
    By doubling: every token adds the sum of the 2^k tokens before its own 2^k, for k = 0, 1, ...
    Nothing outside a row ever enters its sum, so that neighbours leave no rounding in it, and
    branches of a tree are no harder than rows.

    Examples
    --------
    >>> values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    >>> running_sums(values, torch.tensor([[-1, 0, 1, 2]])).tolist()
    [[1.0, 3.0, 7.0, 15.0]]
    >>> running_sums(values, torch.tensor([[-1, 0, 0, -1]])).tolist()  # a fork, and another row
    [[1.0, 3.0, 5.0, 8.0]]
    """
    # A column of zero in front stands for what is before a row.
    sums_BT = torch.nn.functional.pad(values_BT.double(), (1, 0))
    before_BT = torch.nn.functional.pad(parents_BT + 1, (1, 0))
    for _ in range(values_BT.shape[1].bit_length()):
        sums_BT = sums_BT + sums_BT.gather(1, before_BT)
        before_BT = before_BT.gather(1, before_BT)
    return sums_BT[:, 1:]


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
