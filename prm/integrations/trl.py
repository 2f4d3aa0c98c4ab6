"""A reward function for TRL's GRPOTrainer: the process reward of every episode.

TRL takes one number per completion, so the scores of an episode's steps are aggregated. Give it
beside the verified outcome, never alone: a policy that is trained towards a learned score only
learns to deceive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prm.data import OnLong
from prm.integrations.episodes import Message, Scores, episode_reward, from_conversation
from prm.score import AGGREGATIONS, Scorer
from trajectory.errors import InputError

RewardFunction = Callable[..., list[float | None]]


def process_reward(
    scorer: Scores, *, aggregation: str | None = None, on_long: OnLong = "error"
) -> RewardFunction:
    """Make a reward function for ``GRPOTrainer(reward_funcs=[outcome, process_reward(scorer)])``.

    Parameters
    ----------
    scorer : Scorer or RemoteScorer
        The reward model.
    aggregation : str, optional
        A row of `prm.score.AGGREGATIONS`; by default that of the checkpoint's kind.
    on_long : {"error", "drop"}
        What to do with an episode that does not fit the reward model: stop, or give it no
        process reward (None, which TRL leaves out) and log the share as
        ``process_reward/too_long``. ``drop`` needs a `Scorer`.

    Returns
    -------
    callable
        Prompts and completions, as texts or as conversations with tool calls, to one reward in
        [0, 1] each. It logs the mean number of steps as ``process_reward/steps``.

    Raises
    ------
    InputError
        If a setting is unknown; when called, if an episode is malformed or too long.
    """
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise InputError(
            f"unknown aggregation {aggregation!r}; aggregations: {', '.join(AGGREGATIONS)}"
        )
    if on_long == "drop" and not isinstance(scorer, Scorer):
        raise InputError("on_long='drop' needs a Scorer in this process: a server refuses instead")

    def process_reward(
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[str | Sequence[Message]],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,  # noqa: ANN401 - the columns of the data set
    ) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        episodes = [from_conversation(i, p, c) for i, (p, c) in enumerate(pairs)]
        fits = [True] * len(episodes)
        if on_long == "drop":
            assert isinstance(scorer, Scorer)
            fits = scorer.fits(episodes)
        scores = iter(scorer.score([e for e, fit in zip(episodes, fits, strict=True) if fit]))
        if log_metric is not None and episodes:
            mean_steps = sum(e.num_steps for e in episodes) / len(episodes)
            log_metric("process_reward/steps", mean_steps)
            log_metric("process_reward/too_long", 1 - sum(fits) / len(fits))
        return [episode_reward(next(scores), aggregation) if fit else None for fit in fits]

    return process_reward
