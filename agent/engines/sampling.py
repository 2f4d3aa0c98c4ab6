"""Draw one token per sequence: counter-based uniforms and inverse-CDF sampling.

Dimension letters: B batch, V vocabulary.

A token is a function of (distribution, seed, position) alone: the uniform it is drawn with is a
hash of the sequence's seed and the token's position, so neither the other sequences in the batch
nor the order of work changes a sample, and a sequence that was set aside continues as if it never
had been.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingColumns:
    """Sampling settings of the sequences of a batch, one entry each."""

    seeds_B: NDArray[np.uint64]
    temperatures_B: NDArray[np.float64]
    """0 is greedy."""
    top_ps_B: NDArray[np.float64]
    top_ks_B: NDArray[np.int64]
    """0 is off."""


def uniforms(seeds_B: NDArray[np.uint64], positions_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hash seeds and positions to numbers in ``[0, 1)``.

    Parameters
    ----------
    seeds_B : uint64 array, shape (B,)
        Seed of each sequence.
    positions_B : int64 array, shape (B,)
        Index in its sequence of the token to be drawn, >= 0.

    Returns
    -------
    float64 array, shape (B,)
        Multiples of ``2**-53``.

    Notes
    -----
    Two rounds of the splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014), the second one keyed by the first's output, so that the
    streams of seeds a multiple of the golden ratio apart do not overlap.

    Examples
    --------
    >>> import numpy as np
    >>> u = uniforms(np.array([1, 1, 2], dtype=np.uint64), np.array([0, 1, 0]))
    >>> bool(len(set(u.tolist())) == 3 and (0 <= u).all() and (u < 1).all())
    True
    """
    key_B = _mix(seeds_B + _GOLDEN)
    counter_B = (positions_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(key_B ^ counter_B) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64: a bijection of 64-bit words with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@torch.inference_mode()
def sample(
    logits_BV: torch.Tensor, columns: SamplingColumns, positions_B: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw one token per row and give its log-probability.

    Parameters
    ----------
    logits_BV : float tensor, shape (B, V)
        Unnormalised log-probabilities of the next token.
    columns : SamplingColumns
        How each row is sampled.
    positions_B : int64 array, shape (B,)
        Index in its sequence of the token to be drawn.

    Returns
    -------
    ids_B : int64 array, shape (B,)
    logprobs_B : float64 array, shape (B,)
        Natural logarithm, under the distribution the token was drawn from: after temperature,
        top-k, then top-p, renormalised; for greedy rows under the plain softmax.

    Notes
    -----
    The drawn id is the first whose cumulative probability exceeds ``u * total`` (ids in their own
    order). The sum runs in float64, whose rounding error is far below the resolution of float32
    probabilities.
    """
    logits_BV = logits_BV.float()
    greedy_B = columns.temperatures_B == 0
    if (columns.temperatures_B != 1).any():
        divisor_B = np.where(greedy_B, 1.0, columns.temperatures_B)
        logits_BV = logits_BV / _column(divisor_B, logits_BV)
    if ((columns.top_ks_B > 0) & ~greedy_B).any():
        logits_BV = _keep_top_k(logits_BV, np.where(greedy_B, 0, columns.top_ks_B))
    if ((columns.top_ps_B < 1) & ~greedy_B).any():
        logits_BV = _keep_top_p(logits_BV, np.where(greedy_B, 1.0, columns.top_ps_B))
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    if greedy_B.all():
        ids_B = logits_BV.argmax(dim=-1)
    else:
        cdf_BV = logprobs_BV.double().exp().cumsum(dim=-1)
        u_B = _column(uniforms(columns.seeds_B, positions_B), cdf_BV)
        ids_B = torch.searchsorted(cdf_BV, u_B * cdf_BV[:, -1:], right=True).squeeze(1)
        ids_B = ids_B.clamp_(max=logits_BV.shape[1] - 1)
        if greedy_B.any():
            is_greedy_B = torch.from_numpy(greedy_B).to(ids_B.device)
            ids_B = torch.where(is_greedy_B, logits_BV.argmax(dim=-1), ids_B)
    drawn_B = logprobs_BV.gather(1, ids_B[:, None]).squeeze(1)
    return ids_B.cpu().numpy(), drawn_B.double().cpu().numpy()


def _column(values_B: NDArray[np.float64], like_BV: torch.Tensor) -> torch.Tensor:
    """Per-row values as a column that broadcasts against a (B, V) tensor."""
    return torch.from_numpy(values_B)[:, None].to(device=like_BV.device, dtype=like_BV.dtype)


def _keep_top_k(logits_BV: torch.Tensor, top_ks_B: NDArray[np.int64]) -> torch.Tensor:
    """Mask all but the k largest logits of each row; k = 0 keeps all; ties at rank k stay."""
    vocabulary = logits_BV.shape[1]
    kept_B = np.where(top_ks_B == 0, vocabulary, np.minimum(top_ks_B, vocabulary))
    largest_BK = logits_BV.topk(int(kept_B.max()), dim=-1).values
    ranks_B1 = torch.from_numpy(kept_B - 1).to(logits_BV.device)[:, None]
    return logits_BV.masked_fill(logits_BV < largest_BK.gather(1, ranks_B1), -torch.inf)


def _keep_top_p(logits_BV: torch.Tensor, top_ps_B: NDArray[np.float64]) -> torch.Tensor:
    """Mask all but the fewest likeliest ids of each row whose mass reaches p."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.double().softmax(dim=-1)
    before_BV = mass_BV.cumsum(dim=-1) - mass_BV
    limit_B1 = _column(np.where(top_ps_B == 1, np.inf, top_ps_B), mass_BV)
    sorted_BV = sorted_BV.masked_fill(before_BV >= limit_B1, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)
