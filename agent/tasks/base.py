"""What a task domain is: where its tasks come from and how an answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from trajectory.records import Task

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

    def grade(self, task: Task, answer: str) -> float:
        """Judge an answer: 1.0 right, 0.0 wrong (or a fraction). Never raises on odd answers."""
        ...
