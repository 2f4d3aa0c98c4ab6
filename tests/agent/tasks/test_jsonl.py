"""The domain for any problem and answer."""

import asyncio

import pytest

from agent.tasks.jsonl import JsonlDomain
from trajectory.records import Task

DOMAIN = JsonlDomain("unused.jsonl")


@pytest.mark.parametrize(
    ("gold", "answer", "grade"),
    [
        ("Paris", " paris. ", 1.0),
        ("the Eiffel Tower", "The Eiffel-Tower", 1.0),
        ("Paris", "Paris, France", 0.0),
        ("1000", "1,000.0", 1.0),
        ("1000", "1001", 0.0),
        ("yes", "", 0.0),
        ("<=", "<=", 1.0),
        ("<=", ">=", 0.0),
        ("\u00e9t\u00e9", "\u0065\u0301t\u0065\u0301", 1.0),
    ],
)
def test_answers_are_compared_as_normal_text_or_numbers(gold, answer, grade):
    task = Task(task_id="t", domain="jsonl", prompt="p", answer=gold)
    assert asyncio.run(DOMAIN.grade(task, answer)) == grade


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"It is \boxed{Rome}. Answer: Paris", "Rome"),
        ("I think.\nAnswer: Paris.", "Paris"),
        ("The capital:\n\n**Paris**\n", "Paris"),
        ("  \n", None),
        ("", None),
    ],
)
def test_the_answer_is_boxed_or_named_or_the_last_line(text, answer):
    assert DOMAIN.extract(text) == answer
