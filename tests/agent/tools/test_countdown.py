"""Countdown: hand-computed steps, reasons for refusals, and the arithmetic of any play."""

import asyncio
import operator
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tools.arguments import Refused
from agent.tools.countdown import CountdownTool, Numbers
from trajectory.errors import InputError
from trajectory.records import Task


def start(*numbers, target=23):
    return Numbers(left=tuple(map(Fraction, numbers)), target=Fraction(target))


def task(**about):
    meta = {"countdown": about} if about else {}
    return Task(task_id="t", domain="planning", prompt="p", answer="a", meta=meta)


def test_two_steps_reach_the_target():
    equation, state = start(30, 100, 93).combine("30 + 93")
    assert (equation, state.left, state.solved) == ("30 + 93 = 123", (100, 123), False)
    equation, state = state.combine("123 - 100")
    assert (equation, state.left, state.solved) == ("123 - 100 = 23", (23,), True)


def test_numbers_left_over_are_no_solution():
    assert not start(23, 1).solved
    assert start(23).solved


@pytest.mark.parametrize(
    ("step", "equation"),
    [
        ("8 - 3", "8 - 3 = 5"),
        ("8-3", "8 - 3 = 5"),
        ("3 - 8", "3 - 8 = -5"),
        ("8×3", "8 * 3 = 24"),
        ("8 x 3", "8 * 3 = 24"),
        ("8 ÷ 2", "8 / 2 = 4"),
        ("8/3", "8 / 3 = 8/3"),
        ("8 + 3 = 12", "8 + 3 = 11"),
        ("-4 - 3", "-4 - 3 = -7"),
        ("3 - -4", "3 - -4 = 7"),
        ("5/2 * 2", "5/2 * 2 = 5"),
        ("8 / 5/2", "8 / 5/2 = 16/5"),
        (" 8 + 3 ", "8 + 3 = 11"),
    ],
)
def test_spellings_and_results(step, equation):
    state = start(8, 3, 2, -4, Fraction(5, 2))
    assert state.combine(step)[0] == equation


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("9 + 3", "9 is not available"),
        ("3 + 3", "3 is not available twice"),
        ("8 / 0", "division by zero"),
        ("8 + 1/0", "division by zero"),
    ],
)
def test_an_impossible_step_is_refused_with_the_reason(step, reason):
    with pytest.raises(Refused, match=f"^{reason}$") as refused:
        start(8, 3, 0).combine(step)
    assert refused.value.problem == "impossible"


@pytest.mark.parametrize("step", ["", "8", "8 + 3 + 0", "8 ** 3", "(8 + 3)", "8 + x", "1.5 + 8"])
def test_what_is_no_step_is_answered_with_the_form(step):
    with pytest.raises(Refused, match=r"is no step: write two of the numbers") as refused:
        start(8, 3, 0).combine(step)
    assert refused.value.problem == "unknown_step"


def test_equal_numbers_are_used_one_at_a_time():
    assert start(5, 5, 1).combine("5 + 5")[1].left == (1, 10)
    assert start(5, 5, 1).combine("5 + 1")[1].left == (5, 6)


def test_the_observation_shows_equation_numbers_and_target():
    async def run():
        session = await CountdownTool().open(task(numbers=[30, 100, 93], target=23), 0)
        steps = ("30 + 90", "30 + 93", "123 - 100")
        return [(o.content, o.error) for o in [await session.call({"step": s}) for s in steps]]

    assert asyncio.run(run()) == [
        (
            "Refused: 90 is not available. Nothing has changed. Numbers left: 30, 100, 93. "
            "Target: 23.",
            "impossible",
        ),
        ("30 + 93 = 123. Numbers left: 100, 123. Target: 23.", None),
        ("123 - 100 = 23. Numbers left: 23. Target: 23.", None),
    ]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, "'t' has no numbers.*planning:countdown:FILE"),
        ({"numbers": [], "target": 1}, "empty list"),
        ({"numbers": [1, "2"], "target": 1}, "'2' is no whole number"),
        ({"numbers": [1, True], "target": 1}, "True is no whole number"),
        ({"numbers": [1, 10**18], "target": 1}, "at most 18 digits"),
        ({"numbers": [1]}, "None is no whole number"),
    ],
)
def test_a_task_without_numbers_is_refused(about, words):
    with pytest.raises(InputError, match=words):
        asyncio.run(CountdownTool().open(task(**about), 0))


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
plays = st.tuples(
    st.lists(st.integers(-50, 50), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(0, 5), st.integers(0, 5)), max_size=5),
)


def steps_of(play):
    """The steps of a play, with the numbers before and after each as multisets."""
    numbers, choices = play
    state = start(*numbers)
    for symbol, i, j in choices:
        left, size = list(state.left), len(state.left)
        if size == 1 or i % size == j % size or (symbol == "/" and left[j % size] == 0):
            continue
        first, second = left[i % size], left[j % size]
        step = f"{first} {symbol} {second}"
        after = state.combine(step)[1]
        yield step, Counter(left), (first, symbol, second), Counter(after.left)
        state = after


@given(plays)
def test_any_step_takes_two_numbers_away_and_adds_their_exact_result(play):
    for _, before, (first, symbol, second), after in steps_of(play):
        assert after == before - Counter([first, second]) + Counter(
            [OPERATIONS[symbol](first, second)]
        )


@given(plays, st.integers(0, 5))
def test_a_branch_equals_replaying_the_steps_and_is_independent(play, length):
    steps = [step for step, *_ in steps_of(play)]

    async def run():
        tool, about = CountdownTool(), task(numbers=play[0], target=1)
        session, again = await tool.open(about, 0), await tool.open(about, 1)
        for step in steps[:length]:
            await session.call({"step": step})
            await again.call({"step": step})
        branch = await session.branch()
        for step in steps[length:]:
            await session.call({"step": step})
        assert branch.state == again.state
        for step in steps[length:]:
            await branch.call({"step": step})
        assert branch.state == session.state

    asyncio.run(run())
