r"""Mathematics problems with a final answer: GSM8K, MATH, AIME and any JSONL of that shape."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.tasks.answers import (
    after_answer_is,
    after_hashes,
    last_boxed,
    normal_text,
    same_number,
    trim,
)
from agent.tasks.base import Split
from agent.tasks.rows import Row, answer_column, make_tasks, read_rows, select
from agent.tasks.verifier import Verifier
from trajectory.errors import InputError
from trajectory.records import Step, Task

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong unless it equals the gold text."""
_NUMBER_BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)\s*\}?$")


SYSTEM_PROMPT = """\
Answer problems by running Python in small steps. Reply with ONLY one short code block per turn,
without any explanation; it is run and you are shown what it prints; variables are kept.
When you know the answer, reply with one sentence holding \\boxed{answer}.

Example
Problem: A crate holds 12 jars and a shop has 3 crates. It sells 9 jars and then the others at $2
each. How many dollars do the others bring?
Your first turn:
```python
jars = 12 * 3
print(jars)
```
You are shown: 36
Your second turn:
```python
others = jars - 9
print(others * 2)
```
You are shown: 54
Your last turn:
The others bring \\boxed{54} dollars."""
"""A worked example keeps small models to short turns, which is what makes an action scorable."""


class MathDomain:
    r"""Problems from a file or a data set, judged by the value of the final answer.

    Parameters
    ----------
    source : str
        Path of a JSONL file, or ``hf:OWNER/NAME`` (``hf:OWNER/NAME@CONFIG``) for a data set that
        the `datasets` library can load.

    Notes
    -----
    Columns: ``problem`` (or ``question``, ``prompt``) and ``answer``; ``id`` is optional. An
    answer may be plain or end a solution as ``#### 72`` (GSM8K); without the column, the last
    ``\boxed{}`` of ``solution`` counts (MATH). A file is one split, returned whole for each,
    unless it has a column ``split``.

    Numbers are compared exactly and texts literally; whatever remains goes to math-verify.
    """

    def __init__(self, source: str) -> None:
        self.name = "math"
        self.system_prompt = SYSTEM_PROMPT
        self.default_tools: tuple[str, ...] = ("python",)
        self._source = source
        self._verifier = Verifier()

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Return tasks ``first .. first + count`` of a split (all when count is None).

        Raises
        ------
        InputError
            If the source is missing, malformed (with the line number) or has too few tasks.
        """
        if self._source.startswith("hf:"):
            rows = _hub_rows(self._source.removeprefix("hf:"), split)
        else:
            rows = read_rows(Path(self._source))
        tasks = make_tasks(rows, domain=self.name, gold=_gold)
        return select(tasks, source=self._source, split=split, first=first, count=count)

    def extract(self, text: str) -> str | None:
        r"""Return the last ``\boxed{...}``, else ``#### x``, else what follows "answer is"."""
        return last_boxed(text) or after_hashes(text) or after_answer_is(text)

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if the answer has the value of the gold answer, else 0.0."""
        gold, given = trim(task.answer), trim(answer)
        if not given:
            return 0.0
        if normal_text(gold) == normal_text(given):
            return 1.0
        if len(given) > MAX_ANSWER_CHARS or _other_base(gold, given):
            return 0.0
        equal = same_number(gold, given)
        if equal is None:  # up to seconds: other episodes go on meanwhile
            equal = await asyncio.to_thread(self._verifier.equivalent, gold, given)
        return float(equal)


def _gold(row: Row) -> str | None:
    """Return a row's gold answer."""
    answer = answer_column(row)
    if answer is not None:
        return after_hashes(answer) or answer
    solution = row.get("solution")
    return last_boxed(solution) if "answer" not in row and isinstance(solution, str) else None


def _other_base(gold: str, answer: str) -> bool:
    """Tell whether both name the base of their digits and the bases differ."""
    left, right = _NUMBER_BASE.search(gold), _NUMBER_BASE.search(answer)
    return left is not None and right is not None and left[1] != right[1]


def _hub_rows(name: str, split: Split) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a split of a data set."""
    import datasets  # slow to import, and only needed here

    path, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot load split {split!r} of data set {name!r}: {error}") from error
    for number, row in enumerate(rows):
        yield f"{name} ({split}), row {number}", row
