"""Countdown problems: make the target from the numbers, each used exactly once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from agent.tasks.answers import after_answer_is, last_boxed
from agent.tasks.rows import Row
from agent.tools.countdown import META, CountdownTool, initial_numbers
from agent.tools.rational import CalculationError, evaluate
from trajectory.errors import InputError
from trajectory.records import JsonValue, Task

SYSTEM_PROMPT = (
    "Make the target from the numbers. In each turn call the tool 'countdown' with one step and "
    "read which numbers are left. When only the target is left, say so in one sentence without a "
    "call."
)
MAX_NUMBERS = 10
_EXPRESSION = re.compile(r"[\d\s()+\-*/]+")


def read_row(row: Row) -> Row:
    """Turn a row with ``input`` and ``output`` into the columns of a task.

    Parameters
    ----------
    row : mapping
        ``input`` (such as ``30,100,93``) or ``numbers`` (a list), ``output`` or ``target``;
        ``id`` and ``split`` are kept where they are given.

    Raises
    ------
    InputError
        If they are no whole numbers >= 0, or not 2 to 10 of them.
    """
    given, target = row.get("input", row.get("numbers")), row.get("output", row.get("target"))
    numbers = [_natural(part) for part in (given.split(",") if isinstance(given, str) else
               given if isinstance(given, list) else [])]  # fmt: skip
    if not 2 <= len(numbers) <= MAX_NUMBERS:
        raise InputError(
            f"the column 'input' must hold 2 to {MAX_NUMBERS} numbers separated by commas, or "
            "'numbers' a list of them"
        )
    goal = _natural(target)
    kept = {key: row[key] for key in ("id", "split") if key in row}
    return {
        "problem": (
            f"Make {goal} from the numbers {', '.join(map(str, numbers))}. Use each of them "
            "exactly once, with + - * and /. Results may be negative or fractions."
        ),
        "answer": str(goal),
        META: {"numbers": list(numbers), "target": goal},
        **kept,
    }


async def reached(task: Task, calls: Sequence[Mapping[str, JsonValue]]) -> bool:
    """Tell whether only the target is left after the tool was called with these arguments."""
    session = await CountdownTool().open(task, 0)
    for arguments in calls:
        await session.call(arguments)
    return session.state.solved


def reached_in_words(task: Task, answer: str) -> bool:
    """Tell whether a text ends with an expression of all the numbers that makes the target."""
    lines = [line for line in answer.splitlines() if line.strip()] or [""]
    text = last_boxed(answer) or after_answer_is(answer) or lines[-1]
    text = text.partition("=")[0].replace("×", "*").replace("÷", "/").strip(" .$`")
    state = initial_numbers(task)
    used = Counter(number.lstrip("0") or "0" for number in re.findall(r"\d+", text))
    if used != Counter(map(str, state.left)) or not _EXPRESSION.fullmatch(text):
        return False
    if "**" in text or "//" in text:
        return False
    try:
        return evaluate(text) == state.target
    except CalculationError:
        return False


def _natural(value: JsonValue) -> int:
    """Read a whole number >= 0."""
    text = str(value).strip()
    if isinstance(value, bool) or re.fullmatch(r"\d{1,18}", text) is None:
        raise InputError(f"{value!r} is no whole number from 0 to 18 digits")
    return int(text)
