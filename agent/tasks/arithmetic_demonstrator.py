"""A weak demonstrator of arithmetic: follows the oracle, slips, and goes on from the wrong result.

Policies warmed up on its trajectories inherit its slips with their rates, so the value of a state
depends on which operations are still ahead, and that can be read in the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from agent.tasks.arithmetic import calculator_call, gold_call, gold_problem, progress
from agent.tasks.arithmetic_problems import KINDS, Operation, Problem
from agent.tools.base import Tool
from trajectory.formats import format_call
from trajectory.records import Step, Task, ToolCall

SlipKind = Literal["wrong_operator", "wrong_operand", "wrong_digit", "skipped"]

_EASY_SLIPS: tuple[SlipKind, ...] = ("wrong_operand", "wrong_digit", "skipped", "wrong_operator")
_HARD_SLIPS: tuple[SlipKind, ...] = (*("wrong_operator",) * 17, *_EASY_SLIPS[:3])
"""What goes wrong, equally likely entries: hard kinds are mostly misread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weakness:
    """How often the demonstrator errs."""

    slip: float = 0.5
    """Probability of a wrong action at the most difficult kind of operation, in [0, 1]."""
    contrast: float = 0.95
    """How much the rate depends on the kind, in [0, 1]; 0 slips equally everywhere."""
    recovery: float = 0.1
    """Probability that the turn after a slip goes back and repairs it, in [0, 1]."""

    def rate(self, kind: str) -> float:
        """Return the slip probability at one kind of operation.

        Notes
        -----
        ``slip * (1 - contrast * (1 - difficulty))`` with the kind's difficulty in [0, 1].

        Examples
        --------
        >>> weakness = Weakness(slip=0.5, contrast=0.8)
        >>> round(weakness.rate("half"), 3), round(weakness.rate("gain"), 3)
        (0.5, 0.1)
        """
        return self.slip * (1 - self.contrast * (1 - KINDS[kind].difficulty))


@dataclass(frozen=True, slots=True)
class _Action:
    """One decision: the call (None to answer), and the fault in it."""

    thought: str
    call: ToolCall | None
    pointer: int
    fault: SlipKind | None = None


async def demonstrate(
    task: Task, tool: Tool, *, weakness: Weakness, rng: Random
) -> tuple[Step, ...]:
    """Solve a task with the tool, slipping now and then.

    Parameters
    ----------
    task : Task
        An arithmetic task.
    tool : Tool
        The calculator; every call is really run.
    weakness : Weakness
        Slip and recovery rates; ``slip=0`` demonstrates the gold program.
    rng : Random
        Source of the slips.

    Returns
    -------
    tuple of Step
        One call a step, then the final answer. `Step.perturbation` names the slip, if any; it is
        never part of the text.
    """
    problem = gold_problem(task)
    session = await tool.open(task, 0)
    steps: list[Step] = []
    result, pointer, slipped = str(problem.start), 0, False
    try:
        while True:
            if slipped and rng.random() < weakness.recovery:
                action = _repair(task, problem, steps)
            else:
                action = _act(problem, pointer, result, weakness, rng)
            if action.call is None:
                text = f"The answer is {result}."
                steps.append(Step(text=text, perturbation=action.fault))
                return tuple(steps)
            observed = await session.call(json.loads(action.call.arguments))
            observation = replace(observed, seconds=0.0)  # the same demonstration every time
            steps.append(
                Step(
                    text=f"{action.thought}\n{format_call(action.call)}",
                    calls=(action.call,),
                    observations=(observation,),
                    perturbation=action.fault,
                )
            )
            if observation.error is None:
                result = observation.content
            pointer, slipped = action.pointer, action.fault is not None
    finally:
        await session.close()


def _repair(task: Task, problem: Problem, steps: Sequence[Step]) -> _Action:
    """Go back to the last right value and do the next operation rightly."""
    done = progress(task, steps).done
    call = gold_call(problem, done)
    if call is None:
        return _Action("", None, done)
    return _Action(f"Wait. {problem.operations[done].phrase}.", call, done + 1)


def _act(problem: Problem, pointer: int, result: str, weakness: Weakness, rng: Random) -> _Action:
    """Do the operation at ``pointer`` from ``result``, or slip."""
    operations = problem.operations
    if pointer == len(operations):
        return _Action("", None, pointer)
    operation = operations[pointer]
    fault: SlipKind | None = None
    if rng.random() < weakness.rate(operation.kind):
        difficult = KINDS[operation.kind].difficulty > 0
        fault = rng.choice(_HARD_SLIPS if difficult else _EASY_SLIPS)
    if fault == "skipped":
        pointer += 1
        if pointer == len(operations):
            return _Action("", None, pointer, fault)
        operation = operations[pointer]
    right = operation.expression(result)
    written = _garble(problem, operation, result, fault, rng)
    if written == right and fault != "skipped":
        fault = None
    return _Action(f"{operation.phrase}.", calculator_call(written), pointer + 1, fault)


def _garble(
    problem: Problem, operation: Operation, result: str, fault: SlipKind | None, rng: Random
) -> str:
    """Write the expression of an operation with a fault in it."""
    template = KINDS[operation.kind].expression
    if fault in (None, "skipped"):
        return operation.expression(result)
    if fault == "wrong_operator":
        return operation.expression(result, template=KINDS[operation.kind].wrong_operator)
    own = operation.operands or (2,)
    place = int(rng.random() * len(own))
    if fault == "wrong_operand":
        others = [n for op in problem.operations for n in op.operands] + list(problem.distractors)
        wrong = rng.choice([n for n in others if n != own[place]] or [own[place] + 1])
    else:
        wrong = _wrong_digit(own[place], rng)
    numbers = dict(zip("ab", (*own[:place], wrong, *own[place + 1 :]), strict=False))
    return template.replace("2", "{a}").format(x=result, **numbers)


def _wrong_digit(number: int, rng: Random) -> int:
    """Change one digit, keeping the number of digits."""
    digits = list(str(number))
    place = int(rng.random() * len(digits))
    allowed = [d for d in "123456789" if d != digits[place]]
    digits[place] = rng.choice(allowed)
    return int("".join(digits))
