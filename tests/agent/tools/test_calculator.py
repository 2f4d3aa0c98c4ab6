"""The calculator as the model sees it."""

import asyncio

import pytest

from agent.tools.calculator import CalculatorTool
from trajectory.records import Task

TASK = Task(task_id="t", domain="d", prompt="p", answer="a")


def call(arguments):
    async def run():
        session = await CalculatorTool().open(TASK, 0)
        return await session.call(arguments)

    return asyncio.run(run())


def test_the_result_is_the_whole_content():
    observation = call({"expression": "1 + 2"})
    assert (observation.content, observation.error) == ("3", None)


@pytest.mark.parametrize(
    ("expression", "error"),
    [("1 +", "syntax"), ("1/0", "division_by_zero"), ("9**9**9", "too_large")],
)
def test_a_mistake_is_a_readable_observation(expression, error):
    observation = call({"expression": expression})
    assert observation.error == error
    assert observation.content.startswith("Error: ")
    assert observation.content.endswith(".")
