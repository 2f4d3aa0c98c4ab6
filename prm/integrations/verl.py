"""A reward function for verl: the verified outcome plus the process reward of the episode.

verl (0.9) calls ``compute_score`` once per episode, from several threads and processes, and takes
one number. So the reward model runs in a ``prm serve`` server, which scores together what arrives
together, and the verified outcome is always part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from prm.integrations.episodes import Scores, episode_reward, from_conversation
from prm.remote import RemoteScorer
from trajectory.errors import InputError

Outcome = Callable[..., Any]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,  # noqa: ANN401 - whatever the data set holds
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str,
    process_weight: float = 0.5,
    aggregation: str | None = None,
    prompt_field: str = "question",
    **rest: Any,  # noqa: ANN401 - passed on to verl's own outcome
) -> dict[str, float]:
    """Score an episode by verl's own outcome for its data source and by a reward model.

    Name it in verl's configuration::

        reward.custom_reward_function.path=pkg://prm.integrations.verl
        reward.custom_reward_function.name=compute_score
        +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000

    Parameters
    ----------
    data_source, solution_str, ground_truth
        As verl gives them.
    extra_info : mapping
        Holds the task under ``prompt_field``, for episodes of one turn; or the whole
        conversation, tool calls and results included, under ``messages`` (an agent loop adds it
        through its ``extra_fields``).
    url : str
        Of a ``prm serve`` server.
    process_weight : float, default=0.5
        Factor on the process reward.
    aggregation, prompt_field, rest
        See `combine`; what is left is passed on to verl's outcome.

    Returns
    -------
    dict
        ``score`` is ``outcome + process_weight * process_reward``; both parts stand beside it.

    Raises
    ------
    InputError
        If the episode or its task is missing, or the server refuses.
    """
    from verl.utils.reward_score import default_compute_score

    verdict = default_compute_score(data_source, solution_str, ground_truth, extra_info, **rest)
    outcome = float(verdict["score"] if isinstance(verdict, Mapping) else verdict)
    return combine(
        _remote(url),
        outcome,
        solution_str,
        extra_info or {},
        process_weight=process_weight,
        aggregation=aggregation,
        prompt_field=prompt_field,
    )


def combine(
    scorer: Scores,
    outcome: float,
    solution: str,
    extra_info: Mapping[str, Any],
    *,
    process_weight: float = 0.5,
    aggregation: str | None = None,
    prompt_field: str = "question",
) -> dict[str, float]:
    """Add an episode's process reward to its outcome, for an outcome of one's own.

    Parameters
    ----------
    scorer : Scorer or RemoteScorer
        The reward model; a `Scorer` is to be used from one thread only.
    outcome : float
        What a checker says of the answer.
    solution : str
        The episode's text, one step, where ``extra_info`` has no ``messages``.
    extra_info : mapping
        As in `compute_score`.
    process_weight : float, default=0.5
        Factor on the process reward.
    aggregation : str, optional
        A row of `prm.score.AGGREGATIONS`; by default that of the checkpoint's kind.
    prompt_field : str, default="question"
        Where ``extra_info`` holds the task.

    Returns
    -------
    dict
        ``score``, ``outcome``, ``process_reward``.
    """
    messages = extra_info.get("messages")
    if messages is not None:
        episode = from_conversation(0, list(messages), [])
    else:
        prompt = extra_info.get(prompt_field)
        if not isinstance(prompt, str):
            raise InputError(
                f"extra_info holds neither 'messages' nor the task as {prompt_field!r} (it has "
                f"{', '.join(sorted(extra_info)) or 'nothing'}): name the field with prompt_field"
            )
        episode = from_conversation(0, prompt, solution)
    process_reward = episode_reward(scorer.score([episode])[0], aggregation)
    return {
        "score": outcome + process_weight * process_reward,
        "outcome": outcome,
        "process_reward": process_reward,
    }


@cache
def _remote(url: str) -> RemoteScorer:
    """Keep the connections to a server."""
    return RemoteScorer(url)
