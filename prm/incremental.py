"""Scoring an episode while it grows: every token is read once.

An `Episode` keeps what the model computed of it so far (the key-value cache). A further step costs
a forward over that step's own tokens only, and a branch of the episode costs no forward at all.
This works because `prm.rendering` tokenises segment by segment, so the ids of a prefix never change
when the episode goes on, and because a causal model never looks ahead. The results of a turn's
calls are segments of their own, so an episode grows call by call as well.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prm.data import mark_written
from prm.implicit import ImplicitModel, PairCache
from prm.metrics import Array
from prm.model import Network, embedding_rows
from prm.rendering import Rendered
from prm.score import Scorer
from trajectory.errors import InputError
from trajectory.records import StepScores, Trajectory

_PROBE = 32
"""Tokens on which a model shows whether it is causal."""
_PROBE_TOLERANCE = 1e-4
"""Largest difference that rounding may make, of the largest logit; models are in float32."""


class EpisodeScorer:
    """Begins episodes that are scored as they grow.

    Parameters
    ----------
    scorer : Scorer
        A loaded reward model on a causal base.

    Raises
    ------
    InputError
        If the base looks ahead (an encoder) or keeps no cache: there is nothing to reuse.

    Examples
    --------
    ``episode = EpisodeScorer(scorer).begin()``; after every step ``episode.extend(trajectory)``
    gives the scores of all prefixes so far, as ``scorer.score([trajectory])[0]`` would. For a
    search, ``episode.branch()`` gives an independent continuation of the same state.
    """

    def __init__(self, scorer: Scorer) -> None:
        model = scorer.checkpoint.model
        # Both of a pair have one architecture, and this one is always a plain model.
        _check_causal(model.reference if isinstance(model, ImplicitModel) else model)
        self._scorer = scorer

    def begin(self) -> Episode:
        """Begin an episode of which nothing is read yet."""
        return Episode(self._scorer)


class Episode:
    """One episode as far as it was read; made by `EpisodeScorer.begin` and `branch`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._model = scorer.checkpoint.model
        self._ids: tuple[int, ...] = ()
        self._margin_at: dict[int, float] = {}
        self._cache = _new_cache(self._model)

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return len(self._ids)

    def branch(self) -> Self:
        """Return an independent copy in the same state, to be extended in another way.

        The cache so far is shared: a branch takes memory only for what it reads itself.
        """
        other = copy.copy(self)
        other._cache = _branch(self._cache)
        return other

    def extend(self, trajectory: Trajectory, *, calibrated: bool = True) -> StepScores:
        """Read what is new in the trajectory and return the scores of all its prefixes.

        Parameters
        ----------
        trajectory : Trajectory
            The episode as it is now: what it was at the last call, any number of further steps,
            and, where a turn makes several calls, further results in its last step (``text`` is
            the whole turn from the beginning; ``calls`` and ``observations`` are those that have
            a result).
        calibrated : bool, default=True
            Whether to apply the checkpoint's calibration.

        Returns
        -------
        StepScores
            S + 1 values in [0, 1] and one for every call, equal to those of `Scorer.score` up to
            rounding.

        Raises
        ------
        InputError
            If the trajectory is not a continuation of what was read (the episode then stays as it
            was), or does not fit the model.
        """
        (rendered,) = self._scorer.render([trajectory])
        self._scorer.check_lengths([trajectory], [rendered])
        read, ids = len(self._ids), rendered.input_ids
        missing = [p for p in rendered.scored if p not in self._margin_at]
        if ids[:read] != self._ids or (missing and missing[0] < read):
            raise InputError(
                f"trajectory {trajectory.trajectory_id} does not continue the episode read so far "
                f"({read} tokens): extend a branch taken before they part, or begin "
                "another episode"
            )
        if len(ids) > read:
            margins_P = self._forward(rendered, read, [p - read for p in missing])
            # A new table: branches share the old one.
            self._margin_at = self._margin_at | dict(zip(missing, margins_P.tolist(), strict=True))
            self._ids = ids
        margins_P = np.array([self._margin_at[p] for p in rendered.scored])
        return self._scorer.scores_of(trajectory, rendered, margins_P, calibrated=calibrated)

    @torch.inference_mode()
    def _forward(self, rendered: Rendered, read: int, columns: list[int]) -> Array:
        """Read the ids after the first ``read``; gives the raw log-odds at columns of these."""
        # A forward that fails half-way must not leave a half-grown cache behind.
        cache = _branch(self._cache)
        written_BT = None
        if isinstance(self._model, ImplicitModel):
            whole_BT = mark_written([rendered], torch.tensor([rendered.input_ids]))
            written_BT = whole_BT[:, read:].to(self._model.device)
        logits_TC = _read(self._model, rendered.input_ids[read:], cache, written_BT=written_BT)
        self._cache = cache
        margins_P = self._scorer.checkpoint.head.margin(logits_TC[columns].float())
        array: Array = margins_P.cpu().double().numpy()
        return array


def _read(
    model: Network,
    ids: tuple[int, ...],
    cache: Cache | PairCache,
    *,
    written_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a forward that continues a cache, which grows; returns logits of shape (T, C)."""
    input_ids_BT = torch.tensor([ids], device=model.device)
    asked = {} if written_BT is None else {"written": written_BT}
    output = model(input_ids=input_ids_BT, past_key_values=cache, use_cache=True, **asked)
    logits_TC: torch.Tensor = output.logits[0]
    return logits_TC


def _new_cache(model: Network) -> Cache | PairCache:
    """Make the cache of a text of which nothing is read yet."""
    if isinstance(model, ImplicitModel):
        policy, reference = (DynamicCache(config=model.config) for _ in range(2))
        return PairCache(policy=policy, reference=reference)
    return DynamicCache(config=model.config)


def _branch(cache: Cache | PairCache) -> Cache | PairCache:
    """Copy what was read so that both copies can grow."""
    if isinstance(cache, PairCache):  # its tensors are replaced, never written into
        policy, reference = _branch_cache(cache.policy), _branch_cache(cache.reference)
        return replace(cache, policy=policy, reference=reference)
    return _branch_cache(cache)


def _branch_cache(cache: Cache) -> Cache:
    """Copy a cache so that both copies can grow; growing layers share what they hold by then."""
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        other = copy.copy(cache)
        # These layers replace their tensors when they grow and never write into them.
        other.layers = [copy.copy(layer) for layer in cache.layers]
        return other
    return copy.deepcopy(cache)


@torch.inference_mode()
def _check_causal(model: PreTrainedModel) -> None:
    """Refuse a model that looks ahead or does not continue from a cache, by trying it."""
    refusal = (
        f"{type(model).__name__} is not a causal model: it reads a whole trajectory at once and "
        "has no cache to reuse, so an episode cannot be scored incrementally; use Scorer.score"
    )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(refusal)
    rows = embedding_rows(model)
    ids = tuple((7 * i + 1) % rows for i in range(_PROBE))
    whole_TC = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    cache: Cache = DynamicCache(config=model.config)
    half = _PROBE // 2
    parts = [_read(model, part, cache) for part in (ids[:half], ids[half:])]
    difference = float((torch.cat(parts) - whole_TC).abs().max())
    if not difference <= _PROBE_TOLERANCE * float(whole_TC.abs().max()):
        raise InputError(refusal)
