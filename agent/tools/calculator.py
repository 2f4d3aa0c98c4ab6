"""The `calculator` tool: one arithmetic expression, evaluated exactly."""

from __future__ import annotations

import time
from collections.abc import Mapping

from agent.tools.arguments import text_argument, text_schema
from agent.tools.base import SideEffect
from agent.tools.rational import CalculationError, evaluate, format_number
from trajectory.records import JsonValue, Observation, Task


class CalculatorSession:
    """A calculator has no state, so every session is the same."""

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Evaluate ``expression``; what is wrong with it comes back as an observation."""
        started = time.perf_counter()
        expression = text_argument(arguments, "expression")
        if isinstance(expression, Observation):
            return expression
        try:
            content, error = format_number(evaluate(expression)), None
        except CalculationError as problem:
            content, error = f"Error: {problem}.", problem.problem
        return Observation(content=content, error=error, seconds=time.perf_counter() - started)

    async def branch(self) -> CalculatorSession:
        """Return another session."""
        return CalculatorSession()

    async def close(self) -> None:
        """Do nothing: nothing is held."""


class CalculatorTool:
    """Exact arithmetic: 0.1 + 0.2 is 0.3."""

    def __init__(self) -> None:
        self.name = "calculator"
        self.description = (
            "Evaluate an arithmetic expression of numbers, + - * / // % ** and parentheses."
        )
        self.parameters: Mapping[str, JsonValue] = text_schema(
            "expression", "The expression, for example (3 + 4) * 2."
        )
        self.effect = SideEffect.PURE

    async def open(self, task: Task, seed: int) -> CalculatorSession:
        """Begin a session; neither task nor seed matters."""
        return CalculatorSession()
