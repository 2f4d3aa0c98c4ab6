"""Blocksworld problems: PlanBench rows with PDDL text, told in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from agent.tasks.rows import Row
from agent.tools.arguments import Refused
from agent.tools.blocks import META, Blocks, BlocksTool, initial_blocks, normal_fact
from trajectory.errors import InputError
from trajectory.records import JsonValue, Task

SYSTEM_PROMPT = (
    "Move the blocks until the goal holds. In each turn call the tool 'blocks' with one action and "
    "read where the blocks are then. When the goal holds, say so in one sentence without a call."
)
_RULES = (
    "You have one hand and some blocks. A block is clear if no block is on it and it is not in "
    "your hand. With an empty hand you can take one clear block: pick-up from the table, or "
    "unstack from another block. The block in your hand can go on the table (put-down) or on a "
    "clear block (stack)."
)
_GOALS = {
    "on": "{0} on {1}",
    "ontable": "{0} on the table",
    "clear": "{0} clear",
    "holding": "{0} in your hand",
    "handempty": "your hand empty",
}
_KIND = r"(?:pick|put|stack|unstack)"
_WRITTEN = re.compile(
    rf"\(\s*({_KIND}\b[^()\n]*)\)|^[ \t]*(?:[-*]|\d+[.):])?[ \t]*({_KIND}\b[^\n]*)$",
    re.IGNORECASE | re.MULTILINE,
)
"""An action of a plan: in parentheses, or on a line of its own with or without a number."""

Expression = list["str | Expression"]


def read_row(row: Row) -> Row:
    """Turn a row with ``problem_pddl`` into the columns of a task.

    Parameters
    ----------
    row : mapping
        ``problem_pddl`` is required; ``instance_id`` (or ``id``), ``ground_truth_plan`` and
        ``split`` are kept where they are given.

    Raises
    ------
    InputError
        If there is no such text, the blocks cannot stand as it says, or the goal names others.
    """
    text = row.get("problem_pddl")
    if not isinstance(text, str):
        raise InputError("no problem: the column 'problem_pddl' must hold a PDDL problem")
    init, goal = _facts(text, ":init"), _facts(text, ":goal")
    state = Blocks.from_facts(init)
    unknown = {name for fact in goal for name in fact.split()[1:]} - set(state.names)
    if unknown or not goal:
        raise InputError(f"the goal names {', '.join(sorted(unknown)) or 'nothing'}: name blocks")
    kinds = [fact.split() for fact in goal]
    words = ", ".join(_GOALS[kind].format(*names) for kind, *names in kinds)
    about: dict[str, JsonValue] = {"init": list(init), "goal": list(goal)}
    if row.get("ground_truth_plan") is not None:
        about["plan"] = row["ground_truth_plan"]
    kept = {key: row[key] for key in ("split",) if key in row}
    return {
        "id": row.get("instance_id", row.get("id")),
        "problem": f"{_RULES}\nNow: {state.words()}\nGoal: {words}.",
        "answer": words,
        META: about,
        **kept,
    }


async def reached(task: Task, calls: Sequence[Mapping[str, JsonValue]]) -> bool:
    """Tell whether the goal holds after the tool was called with these arguments."""
    session = await BlocksTool().open(task, 0)
    for arguments in calls:
        await session.call(arguments)
    return _goal(task) <= session.state.facts()


def reached_in_words(task: Task, answer: str) -> bool:
    """Tell whether a text holds a whole plan that can be carried out and reaches the goal."""
    state = initial_blocks(task)
    for in_parentheses, on_a_line in _WRITTEN.findall(answer):
        try:
            state = state.act(in_parentheses or on_a_line)
        except Refused:
            return False
    return _goal(task) <= state.facts()


def _goal(task: Task) -> set[str]:
    """Return the facts that have to hold at the end."""
    about = task.meta.get(META)
    goal = about.get("goal") if isinstance(about, dict) else None
    if not isinstance(goal, list) or not goal:
        raise InputError(f"the task {task.task_id!r} has no goal in meta {META!r}: give its facts")
    return {normal_fact(str(fact)) for fact in goal}


def _facts(text: str, section: str) -> list[str]:
    """Return the facts of a section of a PDDL problem."""
    problem = _parse(text)
    found = [part for part in problem if isinstance(part, list) and part[:1] == [section]]
    if len(found) != 1:
        raise InputError(f"the PDDL problem has {len(found)} sections {section}: it needs one")
    facts: list[str] = []
    todo = found[0][1:]
    while todo:
        part = todo.pop(0)
        if isinstance(part, list) and part[:1] == ["and"]:
            todo = part[1:] + todo
        elif isinstance(part, list) and all(isinstance(word, str) for word in part):
            facts.append(normal_fact(" ".join(map(str, part))))
        else:
            raise InputError(f"{section} holds {part!r}: only facts and (and ...) are read")
    return facts


def _parse(text: str) -> Expression:
    """Parse the outermost parenthesis of a PDDL text, comments left out."""
    stack: list[Expression] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text)):
        if word == "(":
            stack.append([])
        elif word == ")" and len(stack) > 1:
            closed = stack.pop()
            stack[-1].append(closed)
        else:
            stack[-1].append(word.lower())
    if len(stack) != 1 or len(stack[0]) != 1 or isinstance(stack[0][0], str):
        raise InputError("the PDDL problem has parentheses that do not match")
    return stack[0][0]
