"""Planning problems whose goal is a state: it is tested on the environment, not on what is said."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.tasks import planning_blocks, planning_countdown
from agent.tasks.base import Split
from agent.tasks.rows import Row, answer_column, make_tasks, read_rows, select
from trajectory.errors import InputError
from trajectory.records import JsonValue, Step, Task

Arguments = Mapping[str, JsonValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of planning problem."""

    tool: str
    """The environment, as a tool."""
    system_prompt: str
    read_row: Callable[[Row], Row]
    """From a row of the file to the columns of a task."""
    reached: Callable[[Task, Sequence[Arguments]], Awaitable[bool]]
    """Whether the goal holds after calls of the tool, in a fresh environment."""
    reached_in_words: Callable[[Task, str], bool]
    """Whether a text holds a whole plan that reaches the goal, or nothing is left to do."""


KINDS = {
    "blocksworld": Kind(
        tool="blocks",
        system_prompt=planning_blocks.SYSTEM_PROMPT,
        read_row=planning_blocks.read_row,
        reached=planning_blocks.reached,
        reached_in_words=planning_blocks.reached_in_words,
    ),
    "countdown": Kind(
        tool="countdown",
        system_prompt=planning_countdown.SYSTEM_PROMPT,
        read_row=planning_countdown.read_row,
        reached=planning_countdown.reached,
        reached_in_words=planning_countdown.reached_in_words,
    ),
}


class PlanningDomain:
    """Problems from a JSONL file, solved by acting in an environment.

    Parameters
    ----------
    kind : {"blocksworld", "countdown"}
        ``blocksworld``: PlanBench rows with ``problem_pddl``. ``countdown``: rows with ``input``
        and ``output``.
    path : str
        The file. It is one split, returned whole for each, unless it has a column ``split``.

    Raises
    ------
    InputError
        If the kind is unknown.

    Notes
    -----
    An episode that called the environment is judged by the state its calls brought about, and by
    nothing else: they are repeated in a fresh environment and the goal is tested there. An episode
    that never called it is right if its final text holds a whole plan (Blocksworld: actions, one
    a line or in parentheses; Countdown: one expression of all the numbers) that reaches the goal
    from the initial state.
    """

    def __init__(self, kind: str, path: str) -> None:
        if kind not in KINDS:
            valid = " or ".join(f"planning:{name}:FILE.jsonl" for name in KINDS)
            raise InputError(f"unknown planning problems {kind!r}: write {valid}")
        self.name = "planning"
        self._kind = KINDS[kind]
        self.system_prompt = self._kind.system_prompt
        self.default_tools: tuple[str, ...] = (self._kind.tool,)
        self._path = path

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
        """Return the text itself: what counts is the state, or the plan that it holds."""
        return text.strip() or None

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if the goal holds in the state the episode's calls led to, else 0.0.

        Raises
        ------
        InputError
            If the task has no initial state or goal.
        """
        calls = [arguments for step in steps for arguments in _calls(step, self._kind.tool)]
        if calls:
            return float(await self._kind.reached(task, calls))
        return float(self._kind.reached_in_words(task, answer))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Yield each row's place and the columns of its task."""
        for place, row in read_rows(Path(self._path)):
            try:
                yield place, self._kind.read_row(row)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error


def _calls(step: Step, tool: str) -> list[Arguments]:
    """Return the arguments of a step's calls that reached the tool, refused ones included."""
    return [
        _arguments(call.arguments)
        for call, seen in zip(step.calls, step.observations, strict=True)
        if call.name == tool and seen.error != "unknown_tool"
    ]


def _arguments(text: str) -> Arguments:
    """Read a call's arguments; what is no JSON object changes no state."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
