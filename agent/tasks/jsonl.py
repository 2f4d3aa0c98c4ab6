"""Any JSONL file with a problem and an answer per row, judged by its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from agent.tasks.answers import after_answer_is, last_boxed, same_number, trim
from agent.tasks.base import Split
from agent.tasks.rows import answer_column, make_tasks, read_rows, select
from trajectory.records import Step, Task


class JsonlDomain:
    r"""Problems whose answer is a short text or a number.

    Parameters
    ----------
    path : str
        A JSONL file with the columns ``problem`` (or ``question``, ``prompt``) and ``answer``;
        ``id`` is optional. The file is one split, returned whole for each, unless it has a
        column ``split``.

    Notes
    -----
    An answer is right if it equals the gold answer but for case, spaces and punctuation, or if
    both are plain numbers of the same value.
    """

    def __init__(self, path: str) -> None:
        self.name = "jsonl"
        self.system_prompt = (
            "Answer the question. Use the tools where they help. "
            "When you are done, give the final answer alone on the last line, after 'Answer:'."
        )
        self.default_tools: tuple[str, ...] = ("calculator",)
        self._path = path

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Return tasks ``first .. first + count`` of a split (all when count is None).

        Raises
        ------
        InputError
            If the file is missing, malformed (with the line number) or has too few tasks.
        """
        rows = read_rows(Path(self._path))
        tasks = make_tasks(rows, domain=self.name, gold=answer_column)
        return select(tasks, source=self._path, split=split, first=first, count=count)

    def extract(self, text: str) -> str | None:
        r"""Return the last ``\boxed{...}``, else what follows "answer:", else the last line."""
        lines = [line for line in text.splitlines() if line.strip()]
        return last_boxed(text) or after_answer_is(text) or (trim(lines[-1]) if lines else None)

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if the answer equals the gold answer, else 0.0."""
        equal = same_number(task.answer, answer)
        if equal is not None:
            return float(equal)
        return float(normal_answer(task.answer) == normal_answer(answer))


def normal_answer(text: str) -> str:
    """Reduce a text to case-folded words; a text of punctuation alone stays as it is.

    Examples
    --------
    >>> normal_answer(" The  Eiffel-Tower! ")
    'the eiffel tower'
    >>> normal_answer("<=")
    '<='
    """
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    words = re.findall(r"\w+", folded)
    return " ".join(words) if words else folded
