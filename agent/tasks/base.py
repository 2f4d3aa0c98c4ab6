"""What a task domain is: where its tasks come from and how an answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from trajectory.records import Step, Task

Split = Literal["train", "validation", "test"]


class TaskDomain(Protocol):
    """A family of tasks with its own checker.

    Instances are made by `agent.tasks.parse_tasks` from a specification such as ``arithmetic``,
    ``arithmetic:operations=2-6,distractors=1``, ``math:path/to/file.jsonl`` or ``file.jsonl``.
    """

    name: str
    system_prompt: str
    """Instructions put before the problem; empty for none."""
    default_tools: tuple[str, ...]
    """Tools offered unless the user names others."""

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Return tasks ``first .. first + count`` of a split (all when count is None).

        Raises
        ------
        InputError
            If the source is missing, malformed (with the line number) or has too few tasks.
        """
        ...

    def extract(self, text: str) -> str | None:
        """Return the final answer in the last turn's text, or None if it holds none."""
        ...

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Judge how an episode ended: 1.0 right, 0.0 wrong (or a fraction).

        Parameters
        ----------
        task : Task
            One of this domain's.
        answer : str
            What `extract` found; odd answers are wrong, never an error.
        steps : sequence of Step
            The whole episode, for domains whose goal is a state that its calls brought about.

        Raises
        ------
        ToolFailure
            If a checker that runs code broke: the episode has no verdict then.
        """
        ...
