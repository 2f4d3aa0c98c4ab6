"""What a training library knows of an episode, as a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prm.score import aggregate
from trajectory.errors import InputError
from trajectory.formats import from_messages
from trajectory.records import (
    JsonValue,
    Step,
    StepScores,
    StopReason,
    Task,
    Trajectory,
)

Message = dict[str, JsonValue]


class Scores(Protocol):
    """What `Scorer` and `RemoteScorer` have in common."""

    def score(
        self, trajectories: Sequence[Trajectory], *, calibrated: bool = True
    ) -> list[StepScores]:
        """Score every prefix of every trajectory."""


def episode_reward(scores: StepScores, aggregation: str | None) -> float:
    """Turn the scores of an episode's steps into its reward.

    Parameters
    ----------
    scores : StepScores
        Of a whole episode.
    aggregation : str or None
        A row of `prm.score.AGGREGATIONS`; None takes ``last`` for values and ``min`` for
        correctness, the defaults of the two kinds.

    Returns
    -------
    float
        In [0, 1]. The prompt's score plays no part, unless the episode has no step.
    """
    default = "last" if scores.kind == "value" else "min"
    return aggregate(scores.values[1:] or scores.values, aggregation or default)


def from_conversation(
    number: int, prompt: str | Sequence[Message], completion: str | Sequence[Message]
) -> Trajectory:
    """Read an episode given as text, or as messages with tool calls and their results.

    Parameters
    ----------
    number : int
        For error messages.
    prompt, completion : str or list of messages
        Both of the same form. A text completion is one step.

    Raises
    ------
    InputError
        If the messages are malformed, or there is no user message.

    Notes
    -----
    A call at the very end that has no result (the episode was cut off there) is kept as text.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return Trajectory(
            trajectory_id=f"episode {number}",
            task=Task(task_id=f"episode {number}", domain="", prompt=prompt, answer=""),
            steps=(Step(text=completion),) if completion else (),
            stop=StopReason.MAX_STEPS,  # nobody has judged it
        )
    if isinstance(prompt, str) or isinstance(completion, str):
        raise InputError(f"episode {number}: prompt and completion must both be text or messages")
    users = [str(m.get("content") or "") for m in prompt if m.get("role") == "user"]
    if not users:
        raise InputError(f"episode {number}: the prompt has no user message, which states the task")
    task = Task(task_id=f"episode {number}", domain="", prompt="\n".join(users), answer="")
    messages = _close([*prompt, *completion])
    try:
        return from_messages(messages, trajectory_id=f"episode {number}", task=task)
    except ValueError as error:
        raise InputError(f"episode {number}: {error}") from None


def _close(messages: list[Message]) -> list[Message]:
    """Give the calls of the last turn that were never answered an empty result."""
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
    if last is None:
        return messages
    calls = messages[last].get("tool_calls")
    missing = len(calls) - (len(messages) - 1 - last) if isinstance(calls, list) else 0
    empty: Message = {"role": "tool", "content": ""}
    return [*messages, *(empty for _ in range(missing))]
