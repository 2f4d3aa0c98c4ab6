"""Programming problems: a function is written, tried out, and judged by tests it never meets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.sandbox import SandboxProvider
from agent.tasks.base import Split
from agent.tasks.code_rows import read_row
from agent.tasks.code_tests import Checker, HiddenTests
from agent.tasks.rows import Row, answer_column, make_tasks, read_rows, select
from trajectory.errors import InputError
from trajectory.records import Step, Task
from trajectory.seeds import derive_seed

_FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LANGUAGES = frozenset({"python", "py", "python3", ""})

SYSTEM_PROMPT = """\
Write the Python function that is asked for. Reply with ONLY one code block per turn, without any
explanation; it is run and you are shown what it prints.
First write the whole function, imports included, with a few calls that try it out.
When it is right, reply with one sentence and no code: your last block that defines the function is
your answer. Hidden tests decide.

Example
Problem: Write a function to add up the even numbers of a list.
Define the function sum_even. It is called like this: sum_even([1, 2, 4]), and returns an int.
Your first turn:
```python
def sum_even(numbers):
    return sum(n for n in numbers if n % 2 == 0)

print(sum_even([1, 2, 4]), sum_even([]))
```
You are shown: 6 0
Your last turn:
The function is finished."""


class CodeDomain:
    """Problems from a JSONL file, judged by hidden tests.

    Parameters
    ----------
    path : str
        A file in the format of HumanEval or MBPP. Of MBPP the published splits are used
        (``test``: ``task_id`` 11 to 510); other files are one split, returned whole for each,
        unless they have a column ``split``.
    sandbox : SandboxProvider
        Where candidates and hidden tests run.

    Notes
    -----
    The answer is the last code block that defines the tested function: one of the final turn, else
    of an earlier call of the ``python`` tool. It has to stand on its own, imports included. See
    `agent.tasks.code_tests` for how it is judged.
    """

    def __init__(self, path: str, sandbox: SandboxProvider) -> None:
        self.name = "code"
        self.system_prompt = SYSTEM_PROMPT
        self.default_tools: tuple[str, ...] = ("python",)
        self._path = path
        self._checker = Checker(sandbox)

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Return tasks ``first .. first + count`` of a split (all when count is None).

        Raises
        ------
        InputError
            If the file is missing, malformed (with the line number) or has too few tasks.
        """
        tasks = make_tasks(self._rows(), domain=self.name, gold=answer_column)
        return select(tasks, source=self._path, split=split, first=first, count=count)

    def extract(self, text: str) -> str | None:
        """Return the text itself: which of its blocks counts depends on the task."""
        return text.strip() or None

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if the submitted code passes the hidden tests, else 0.0.

        Raises
        ------
        ToolFailure
            If the sandbox of the tests broke.
        InputError
            If the task has no hidden tests.
        """
        code = submission(HiddenTests.of(task).functions, answer, steps)
        if code is None:
            return 0.0
        seed = derive_seed("hidden tests", task.task_id)
        return float(await self._checker.passes(task, code, seed=seed))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Yield each row's place and the columns of its task."""
        for place, row in read_rows(Path(self._path)):
            try:
                yield place, read_row(row)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error


def submission(functions: Sequence[str], answer: str, steps: Sequence[Step] = ()) -> str | None:
    r"""Return the last code that defines the functions, None if there is none.

    Parameters
    ----------
    functions : sequence of str
        Names that all have to be defined.
    answer : str
        The final turn: its code blocks count first, or the text itself if it has none.
    steps : sequence of Step
        The episode, whose ``python`` calls count next, the last one first.

    Examples
    --------
    >>> submission(["f"], "So:\n```python\ndef f():\n    return 1\n```\nTry\n```python\nf()\n```")
    'def f():\n    return 1\n'
    """
    found = _blocks(answer) if _FENCED.search(answer) else [answer]
    for step in reversed(steps):
        codes = [_code(call.arguments) for call in step.calls if call.name == "python"]
        found = [part for code in codes for part in (_blocks(code) or [code])] + found
    defining = [code for code in found if all(_defines(code, name) for name in functions)]
    return defining[-1] if defining else None


def _blocks(text: str) -> list[str]:
    """Return the contents of the fenced blocks that may be Python."""
    return [code for language, code in _FENCED.findall(text) if language.lower() in _LANGUAGES]


def _code(arguments: str) -> str:
    """Return the code of a call of the ``python`` tool, empty if it has none."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return ""
    return str(value.get("code", "")) if isinstance(value, dict) else ""


def _defines(code: str, name: str) -> bool:
    """Whether code binds a name at the top level, by def or assignment."""
    word = re.escape(name)
    return re.search(rf"^(?:(?:async )?def +{word}\b|{word} *(?::|=[^=]))", code, re.M) is not None
