"""The laboratory: generated word problems, their checker and an oracle over trajectories.

The oracle works on values. The gold program of a problem visits the running values ``v_0 .. v_n``,
all different, so a number that a tool returned says which of them it is. `progress` reads a
trajectory's observations in order; from it follow whether the right answer can still be reached
(`reachable`) and what to call next (`next_call`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from random import Random
from typing import Any, cast

from agent.tasks.arithmetic_problems import MOST_OPERATIONS, Dials, Operation, Problem, draw_problem
from agent.tasks.base import Split
from trajectory.errors import InputError
from trajectory.records import Step, Task, ToolCall
from trajectory.seeds import derive_seed

TOOL = "calculator"
SYSTEM_PROMPT = "Solve the problem one calculator call at a time. End with: The answer is N."
GENERATOR = 1
"""Version of the generator; part of every seed, so a change of wording makes new tasks."""
SPLIT_SIZE = 10_000_000
SPLITS: Mapping[Split, int] = {"train": 0, "validation": 1, "test": 2}
"""Which range of seeds a split draws from."""
_BUCKETS: Mapping[Split, range] = {
    "train": range(8),
    "validation": range(8, 9),
    "test": range(9, 10),
}
_ANSWER = re.compile(r"answer is:?\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
_LIMITS = {"operations": (2, MOST_OPERATIONS), "distractors": (0, 4), "numbers": (5, 999)}


def _number(text: str) -> Fraction | None:
    """Read a decimal number, or None."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _whole(name: str, text: str) -> int:
    """Read a whole number within the limits of a dial."""
    low, high = _LIMITS[name]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InputError(
            f"arithmetic option {name}={text!r}: give whole numbers from {low} to {high}"
        )
    return int(text)


def _range(name: str, text: str) -> tuple[int, int]:
    """Read ``3`` or ``2-6``."""
    first, _, last = text.partition("-")
    low, high = _whole(name, first), _whole(name, last or first)
    if low > high:
        raise InputError(f"arithmetic option {name}={text!r}: the range is empty")
    return low, high


def _share(name: str, text: str) -> float:
    """Read a share in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"arithmetic option {name}={text!r}: give a number from 0 to 1")
    return value


def parse_dials(options: Mapping[str, str]) -> Dials:
    """Read the dials from ``name=value`` options.

    Raises
    ------
    InputError
        If a name is unknown or a value out of its range.

    Examples
    --------
    >>> parse_dials({"operations": "3-4", "hard": "0.5"}).operations
    (3, 4)
    """
    readers: Mapping[str, Callable[[str, str], object]] = {
        "operations": _range,
        "distractors": _range,
        "hard": _share,
        "numbers": _whole,
        "deceptive": _share,
    }
    unknown = [name for name in options if name not in readers]
    if unknown:
        raise InputError(
            f"arithmetic has no option {unknown[0]!r}: choose from {', '.join(readers)}"
        )
    chosen: dict[str, Any] = {name: readers[name](name, text) for name, text in options.items()}
    return Dials(**chosen)


class ArithmeticDomain:
    """Generated word problems with a calculator.

    Parameters
    ----------
    dials : Dials, optional
        Difficulty of the problems.

    Notes
    -----
    Splits are disjoint twice over: index ``i`` of a split draws from a seed of that split's own
    range, and a text counts for one split only (by its hash), being drawn again otherwise.
    """

    name = "arithmetic"
    system_prompt = SYSTEM_PROMPT
    default_tools: tuple[str, ...] = (TOOL,)

    def __init__(self, dials: Dials | None = None) -> None:
        self.dials = dials or Dials()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ArithmeticDomain:
        """Make the domain from ``name=value`` options (see `parse_dials`)."""
        return cls(parse_dials(options))

    def load(self, *, split: Split, first: int, count: int | None) -> Sequence[Task]:
        """Generate tasks ``first .. first + count`` of a split.

        Raises
        ------
        InputError
            If no count is given (the generator has no end) or the split is exhausted.
        """
        if count is None:
            raise InputError(
                "arithmetic generates tasks without end: say how many with --num-tasks"
            )
        if first < 0 or first + count > SPLIT_SIZE:
            raise InputError(
                f"arithmetic has tasks 0 to {SPLIT_SIZE - 1} in each split; asked for "
                f"{first} to {first + count - 1}"
            )
        return [self._task(split, index) for index in range(first, first + count)]

    def _task(self, split: Split, index: int) -> Task:
        """Draw the task of one index, the same for ever."""
        settings = repr((GENERATOR, *astuple(self.dials)))
        seed = SPLITS[split] * SPLIT_SIZE + index
        rng = Random(derive_seed("arithmetic", settings, seed))  # noqa: S311 - not secret
        while True:
            problem = draw_problem(rng, self.dials)
            if hashlib.blake2b(problem.text.encode()).digest()[0] % 10 in _BUCKETS[split]:
                break
        tag = hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()
        return Task(
            task_id=f"arithmetic-{split}-{index:06d}-{tag}",
            domain=self.name,
            prompt=problem.text,
            answer=str(problem.values[-1]),
            meta=problem.to_meta(),
        )

    def extract(self, text: str) -> str | None:
        """Return the number after the last ``answer is``, or None.

        Examples
        --------
        >>> ArithmeticDomain().extract("The answer is 1,042.")
        '1042'
        """
        found = _ANSWER.findall(text)
        return str(found[-1]).replace(",", "") if found else None

    async def grade(self, task: Task, answer: str, steps: Sequence[Step] = ()) -> float:
        """Return 1.0 if ``answer`` is the gold number, else 0.0."""
        return float(same_value(answer, task.answer))


def same_value(answer: str, gold: str) -> bool:
    """Tell whether an answer is a number and the gold one.

    Examples
    --------
    >>> same_value("12.0", "12"), same_value("121", "12"), same_value("twelve", "12")
    (True, False, False)
    """
    given = _number(answer)
    return given is not None and given == _number(gold)


def gold_problem(task: Task) -> Problem:
    """Read a task's gold program back from its ``meta``."""
    meta = cast("Mapping[str, object]", task.meta)
    operations = cast("Sequence[Mapping[str, object]]", meta["operations"])
    return Problem(
        text=task.prompt,
        start=cast("int", meta["start"]),
        operations=tuple(
            Operation(
                kind=cast("str", op["kind"]),
                operands=tuple(cast("Sequence[int]", op["operands"])),
                phrase=cast("str", op["phrase"]),
                value=cast("int", op["value"]),
            )
            for op in operations
        ),
        distractors=tuple(cast("Sequence[int]", meta["distractors"])),
        shortcut=cast("int | None", meta["shortcut"]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a trajectory has come along the gold program."""

    done: int
    """Operations done rightly: the right running value ``v_done`` is in the context."""
    on_track: bool
    """Whether the latest result is that value, so that carrying on from it is right."""
    faithful: bool
    """Whether every call wrote the gold expression. A wrong step that happens to give the right
    value (a deceptive shortcut) keeps ``on_track`` and loses this."""
    answered: bool
    """Whether the last step was a final answer (no call)."""


def progress(task: Task, steps: Sequence[Step]) -> Progress:
    """Follow the results of a trajectory along the gold program.

    Parameters
    ----------
    task : Task
        An arithmetic task.
    steps : sequence of Step
        The trajectory so far.

    Notes
    -----
    With ``d`` operations done, a result ``r`` means: ``r = v_j`` with ``j > d``, done becomes
    ``j`` (one call may do several operations); ``r = v_d``, done again, back on track; anything
    else, off track with ``d`` unchanged.
    """
    problem = gold_problem(task)
    position = {Fraction(value): index for index, value in enumerate(problem.values)}
    done, on_track, faithful = 0, True, True
    for step in steps:
        for call, observation in zip(step.calls, step.observations, strict=True):
            expected = gold_call(problem, done)
            faithful = faithful and expected is not None and _same_call(call, expected)
            result = None if observation.error else _number(observation.content)
            index = None if result is None else position.get(result)
            on_track = index is not None and index >= done
            done = max(done, index or 0) if on_track else done
    answered = bool(steps) and not steps[-1].calls
    return Progress(done=done, on_track=on_track, faithful=faithful, answered=answered)


def _same_call(left: ToolCall, right: ToolCall) -> bool:
    """Whether two calls are equal but for spaces."""
    return left.name == right.name and left.arguments.replace(" ", "") == right.arguments.replace(
        " ", ""
    )


def calculator_call(expression: str) -> ToolCall:
    """Return the call that computes an expression."""
    return ToolCall(name=TOOL, arguments=json.dumps({"expression": expression}))


def gold_call(problem: Problem, done: int) -> ToolCall | None:
    """Return the call of the operation after ``done`` right ones, or None if none is left."""
    if done >= len(problem.operations):
        return None
    return calculator_call(problem.operations[done].expression(problem.values[done]))


def next_call(task: Task, steps: Sequence[Step]) -> ToolCall | None:
    """Return the right next call: the first operation not yet done, from its right value.

    Returns
    -------
    ToolCall or None
        None when it is time to answer, or the answer was given.
    """
    state = progress(task, steps)
    return None if state.answered else gold_call(gold_problem(task), state.done)


def reachable(task: Task, steps: Sequence[Step], *, max_steps: int) -> bool:
    """Say whether a sensible agent can still give the right answer.

    Parameters
    ----------
    task : Task
        An arithmetic task.
    steps : sequence of Step
        The trajectory so far.
    max_steps : int
        Step limit of the episode, >= 1.

    Returns
    -------
    bool
        After a final answer: whether it was right. Before: whether the operations not yet done and
        the answer fit into the steps left. An agent can always go back to the last right value,
        which is in its context, so a wrong result alone costs steps but not the answer; whether
        the agent *stands* on a right value is `Progress.on_track`.
    """
    state = progress(task, steps)
    if state.answered:
        answer = ArithmeticDomain().extract(steps[-1].text)
        return answer is not None and same_value(answer, task.answer)
    left = len(gold_problem(task).operations) - state.done
    return len(steps) + left + 1 <= max_steps
