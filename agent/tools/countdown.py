"""The `countdown` tool: two numbers and an operation at a time, until the target is left."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from agent.tools.arguments import Refused, text_argument, text_schema
from agent.tools.base import SideEffect
from trajectory.errors import InputError
from trajectory.records import JsonValue, Observation, Task

META = "countdown"
"""Key of a task's ``meta`` that holds ``{"numbers": [int, ...], "target": int}``."""
MAX_DIGITS = 18
"""Digits of a number of a task."""
_NUMBER = r"(-?\d{1,300}(?:/\d{1,300})?)"
_STEP = re.compile(rf"\s*{_NUMBER}\s*([-+*/×÷x])\s*{_NUMBER}\s*(?:=.*)?", re.DOTALL)
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_SPELLINGS = {"×": "*", "x": "*", "÷": "/"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """The numbers left and the target, exact."""

    left: tuple[Fraction, ...]
    target: Fraction

    @property
    def solved(self) -> bool:
        """Whether every number has been used and the target is what remains."""
        return self.left == (self.target,)

    def words(self) -> str:
        """Return the state as the model reads it."""
        return f"Numbers left: {', '.join(map(str, self.left))}. Target: {self.target}."

    def combine(self, step: str) -> tuple[str, Numbers]:
        """Replace two of the numbers by the result of an operation such as ``30 + 93``.

        Returns
        -------
        tuple of str and Numbers
            The equation, and the state after it.

        Raises
        ------
        Refused
            If the text is no such step, a number is not available, or it divides by zero.

        Examples
        --------
        >>> start = Numbers(left=(Fraction(30), Fraction(100), Fraction(93)), target=Fraction(23))
        >>> equation, after = start.combine("30 + 93")
        >>> equation, after.words()
        ('30 + 93 = 123', 'Numbers left: 100, 123. Target: 23.')
        """
        found = _STEP.fullmatch(step[:1000])
        if found is None:
            raise Refused(
                "unknown_step",
                f"{step[:60]!r} is no step: write two of the numbers with + - * or / between them, "
                "such as 30 + 93",
            )
        first, symbol, second = found[1], _SPELLINGS.get(found[2], found[2]), found[3]
        left, right = self._number(first), self._number(second)
        rest = list(self.left)
        for number in (left, right):
            if number not in rest:
                twice = " twice" if left == right and number in self.left else ""
                raise Refused("impossible", f"{number} is not available{twice}")
            rest.remove(number)
        if symbol == "/" and right == 0:
            raise Refused("impossible", "division by zero")
        result = _OPERATIONS[symbol](left, right)
        after = Numbers(left=(*rest, result), target=self.target)
        return f"{left} {symbol} {right} = {result}", after

    def _number(self, text: str) -> Fraction:
        """Read an operand."""
        numerator, _, denominator = text.partition("/")
        if denominator and int(denominator) == 0:
            raise Refused("impossible", "division by zero")
        return Fraction(int(numerator), int(denominator or 1))


class CountdownSession:
    """The numbers of one episode."""

    def __init__(self, state: Numbers) -> None:
        self.state = state

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Do one step and show the numbers; what cannot be done is refused with the reason."""
        step = text_argument(arguments, "step")
        if isinstance(step, Observation):
            return step
        try:
            equation, self.state = self.state.combine(step)
        except Refused as refusal:
            return Observation(
                content=f"Refused: {refusal}. Nothing has changed. {self.state.words()}",
                error=refusal.problem,
            )
        return Observation(content=f"{equation}. {self.state.words()}")

    async def branch(self) -> CountdownSession:
        """Return a session in the same state."""
        return CountdownSession(self.state)

    async def close(self) -> None:
        """Do nothing: nothing is held."""


class CountdownTool:
    """Combines numbers two by two; only for tasks that say which numbers there are."""

    def __init__(self) -> None:
        self.name = "countdown"
        self.description = (
            "Replace two of the numbers by their sum, difference, product or quotient. A step "
            "cannot be undone. Returns the numbers left."
        )
        self.parameters: Mapping[str, JsonValue] = text_schema(
            "step", "Two of the numbers left with + - * or / between them, for example 30 + 93."
        )
        self.effect = SideEffect.STATEFUL

    async def open(self, task: Task, seed: int) -> CountdownSession:
        """Begin with the task's numbers; nothing is random.

        Raises
        ------
        InputError
            If the task has none.
        """
        return CountdownSession(initial_numbers(task))


def initial_numbers(task: Task) -> Numbers:
    """Return the numbers and target of a task.

    Raises
    ------
    InputError
        If it has none, or one of them is no whole number of at most 18 digits.
    """
    about = task.meta.get(META)
    if not isinstance(about, dict):
        raise InputError(
            f"the task {task.task_id!r} has no numbers, so the tool 'countdown' cannot be used on "
            "it: take --tasks planning:countdown:FILE.jsonl or leave the tool out of --tools"
        )
    numbers, target = about.get("numbers"), about.get("target")
    if not isinstance(numbers, list) or not numbers:
        raise InputError(f"the task {task.task_id!r} has an empty list of numbers: give some")
    return Numbers(left=tuple(map(_whole, numbers)), target=_whole(target))


def _whole(value: JsonValue) -> Fraction:
    """Return a whole number that the tool's steps can name."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**MAX_DIGITS:
        raise InputError(f"{value!r} is no whole number of at most {MAX_DIGITS} digits")
    return Fraction(value)
