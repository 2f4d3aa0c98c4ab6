import asyncio
import json
import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chat import parse_calls
from agent.tasks.arithmetic import (
    ArithmeticDomain,
    calculator_call,
    gold_problem,
    next_call,
    progress,
    reachable,
)
from agent.tasks.arithmetic_demonstrator import Weakness, demonstrate
from agent.tasks.arithmetic_problems import KINDS, LARGEST_VALUE, Dials, draw_problem
from agent.tools.calculator import CalculatorTool
from trajectory.errors import InputError
from trajectory.records import Observation, Step, Task, ToolCall

GOLD = Weakness(slip=0.0, recovery=0.0)


def task_of(index: int = 0, split: str = "test", **options: str) -> Task:
    return ArithmeticDomain.from_options(options).load(split=split, first=index, count=1)[0]


def acted(expression: str) -> Step:
    """A step whose call was really run."""

    async def run() -> Observation:
        session = await CalculatorTool().open(HAND, 0)
        return await session.call({"expression": expression})

    return Step(text="", calls=(calculator_call(expression),), observations=(asyncio.run(run()),))


def demonstrated(
    count: int, weakness: Weakness, **options: str
) -> list[tuple[Task, tuple[Step, ...]]]:
    """Demonstrations of the first training tasks."""
    tasks = ArithmeticDomain.from_options(options).load(split="train", first=0, count=count)

    async def run() -> list[tuple[Step, ...]]:
        tool = CalculatorTool()
        return [
            await demonstrate(task, tool, weakness=weakness, rng=Random(seed))
            for seed, task in enumerate(tasks)
        ]

    return list(zip(tasks, asyncio.run(run()), strict=True))


HAND = Task(
    task_id="by-hand",
    domain="arithmetic",
    prompt="Mia has 12 apples. She buys 5 apples. Tom has twice as many. He sells 4 apples. "
    "How many apples does Tom have?",
    answer="30",
    meta={
        "start": 12,
        "operations": [
            {"kind": "gain", "operands": [5], "phrase": "She buys 5", "value": 17},
            {"kind": "twice", "operands": [], "phrase": "Tom has twice as many", "value": 34},
            {"kind": "lose", "operands": [4], "phrase": "He sells 4", "value": 30},
        ],
        "distractors": [],
        "shortcut": None,
    },
)


# --- tasks


def test_the_same_index_gives_the_same_task_for_ever():
    task = task_of(123)
    assert task.task_id == GOLDEN_ID
    assert task.prompt == GOLDEN_PROMPT
    assert task.answer == GOLDEN_ANSWER


def test_a_range_of_tasks_does_not_depend_on_where_it_begins():
    domain = ArithmeticDomain()
    assert (
        domain.load(split="train", first=5, count=3)
        == (domain.load(split="train", first=0, count=8)[5:])
    )


def test_other_dials_give_other_ids():
    assert task_of(0).task_id != task_of(0, operations="3").task_id


def test_splits_share_no_text():
    easy = ArithmeticDomain.from_options(
        {"operations": "2", "numbers": "5", "hard": "1", "distractors": "0"}
    )
    texts = {
        split: {task.prompt for task in easy.load(split=split, first=0, count=1500)}
        for split in ("train", "validation", "test")
    }
    assert len(texts["train"]) < 1500, "the space is small enough for texts to repeat"
    assert texts["train"].isdisjoint(texts["test"])
    assert texts["train"].isdisjoint(texts["validation"])
    assert texts["validation"].isdisjoint(texts["test"])


dials = st.builds(
    Dials,
    operations=st.tuples(st.integers(2, 16), st.integers(2, 16)).map(lambda p: tuple(sorted(p))),
    distractors=st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda p: tuple(sorted(p))),
    hard=st.floats(0, 1),
    numbers=st.integers(5, 999),
    deceptive=st.floats(0, 1),
)


@given(dials, st.integers(0, 2**32))
def test_a_gold_program_is_exact_and_told_in_its_text(dials: Dials, seed: int):
    problem = draw_problem(Random(seed), dials)
    low, high = dials.operations
    assert low <= len(problem.operations) <= high
    assert dials.distractors[0] <= len(problem.distractors) <= dials.distractors[1]
    assert len(set(problem.values)) == len(problem.values)
    for before, operation in zip(problem.values, problem.operations, strict=False):
        assert eval(operation.expression(before)) == operation.value
        assert 0 <= operation.value <= LARGEST_VALUE
        assert operation.phrase in problem.text
    told = [int(number) for number in re.findall(r"\d+(?!:)\b", problem.text)]
    numbers = [problem.start, *problem.distractors]
    numbers += [n for operation in problem.operations for n in operation.operands]
    assert sorted(told) == sorted(numbers)


@given(st.integers(0, 2**32), st.integers(2, 8))
def test_a_deceptive_problem_has_a_wrong_operator_with_the_right_result(seed: int, count: int):
    problem = draw_problem(Random(seed), Dials(operations=(count, count), deceptive=1.0))
    assert problem.shortcut is not None
    operation = problem.operations[problem.shortcut]
    before = problem.values[problem.shortcut]
    wrong = operation.expression(before, template=KINDS[operation.kind].wrong_operator)
    assert wrong != operation.expression(before)
    assert eval(wrong) == operation.value


@given(st.integers(0, 2**32))
def test_an_honest_problem_has_no_such_operator(seed: int):
    problem = draw_problem(Random(seed), Dials(operations=(2, 8), hard=1.0))
    assert problem.shortcut is None
    for before, operation in zip(problem.values, problem.operations, strict=False):
        wrong = operation.expression(before, template=KINDS[operation.kind].wrong_operator)
        assert eval(wrong) != operation.value


def test_the_share_of_deceptive_problems_is_the_dial():
    tasks = ArithmeticDomain(Dials(deceptive=0.3)).load(split="train", first=0, count=1000)
    share = sum(gold_problem(task).shortcut is not None for task in tasks) / 1000
    assert share == pytest.approx(0.3, abs=0.05)


def test_a_task_holds_its_problem():
    task = task_of(7, operations="6", distractors="2")
    problem = gold_problem(task)
    assert problem.to_meta() == json.loads(json.dumps(task.meta))
    assert task.answer == str(problem.values[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "3"}, "choose from operations, distractors, hard, numbers, deceptive"),
        ({"operations": "1-4"}, "from 2 to 16"),
        ({"operations": "5-3"}, "the range is empty"),
        ({"operations": "x-4"}, "from 2 to 16"),
        ({"distractors": "-1"}, "from 0 to 4"),
        ({"deceptive": "1.5"}, "from 0 to 1"),
        ({"hard": "nan"}, "from 0 to 1"),
        ({"numbers": "1000"}, "from 5 to 999"),
    ],
)
def test_wrong_options_are_refused(options, message):
    if message is None:
        assert ArithmeticDomain.from_options(options).dials.operations == (2, 2)
        return
    with pytest.raises(InputError, match=message):
        ArithmeticDomain.from_options(options)


def test_tasks_without_end_need_a_count():
    with pytest.raises(InputError, match="--num-tasks"):
        ArithmeticDomain().load(split="train", first=0, count=None)


def test_the_end_of_a_split_is_refused():
    with pytest.raises(InputError, match="0 to 9999999"):
        ArithmeticDomain().load(split="train", first=9_999_999, count=2)


# --- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("the answer is: -7", "-7"),
        ("So the answer is 3. No, the answer is 1,234.5!", "1234.5"),
        ("She has 42 apples.", None),
        ("The answer is unknown.", None),
    ],
)
def test_the_last_stated_answer_is_found(text, answer):
    assert ArithmeticDomain().extract(text) == answer


@given(st.integers(0, 500), st.integers(-9999, 9999))
def test_the_checker_accepts_gold_and_nothing_else(index: int, other: int):
    domain, task = ArithmeticDomain(), task_of(index)
    assert asyncio.run(domain.grade(task, task.answer)) == 1.0
    assert asyncio.run(domain.grade(task, str(other))) == float(other == int(task.answer))


@pytest.mark.parametrize("answer", ["", "abc", "1/0", "nan", "inf", "12 apples", "\u0661"])
def test_odd_answers_are_wrong(answer):
    assert asyncio.run(ArithmeticDomain().grade(HAND, answer)) == 0.0


# --- the oracle


def test_the_oracle_walks_the_gold_program():
    steps: list[Step] = []
    for expression in ("12+5", "17*2", "34-4"):
        assert next_call(HAND, steps) == calculator_call(expression)
        steps.append(acted(expression))
    assert next_call(HAND, steps) is None
    state = progress(HAND, steps)
    assert (state.done, state.on_track, state.faithful, state.answered) == (3, True, True, False)


def test_after_a_wrong_result_the_oracle_goes_back_to_the_last_right_value():
    steps = [acted("12+5"), acted("17+2")]
    state = progress(HAND, steps)
    assert (state.done, state.on_track, state.faithful) == (1, False, False)
    assert next_call(HAND, steps) == calculator_call("17*2")
    assert progress(HAND, [*steps, acted("17*2")]).on_track


def test_carrying_on_from_a_wrong_result_is_off_track():
    assert not progress(HAND, [acted("12-5"), acted("7*2")]).on_track


def test_one_call_may_do_several_operations():
    assert progress(HAND, [acted("(12+5)*2")]).done == 2


def test_a_failed_call_does_nothing():
    state = progress(HAND, [acted("12+5"), acted("17**")])
    assert (state.done, state.on_track) == (1, False)
    assert next_call(HAND, [acted("12+5"), acted("17**")]) == calculator_call("17*2")


def test_reachability_is_a_matter_of_the_steps_left():
    # Three operations and the answer need four steps.
    assert reachable(HAND, [], max_steps=4)
    assert not reachable(HAND, [], max_steps=3)
    wrong = [acted("12-5")]
    assert reachable(HAND, wrong, max_steps=5)
    assert not reachable(HAND, wrong, max_steps=4)


@pytest.mark.parametrize(
    ("text", "right"), [("The answer is 30.", True), ("The answer is 31.", False), ("", False)]
)
def test_after_the_answer_only_its_truth_counts(text, right):
    assert reachable(HAND, [Step(text=text)], max_steps=100) == right
    assert next_call(HAND, [Step(text=text)]) is None


def test_a_deceptive_shortcut_is_on_track_but_not_faithful():
    task = task_of(0, deceptive="1")
    problem = gold_problem(task)
    shortcut = problem.shortcut
    values = [str(value) for value in problem.values]
    steps = []
    for index, operation in enumerate(problem.operations[: shortcut + 1]):
        template = KINDS[operation.kind].wrong_operator if index == shortcut else None
        steps.append(acted(operation.expression(values[index], template=template)))
    state = progress(task, steps)
    assert (state.done, state.on_track, state.faithful) == (shortcut + 1, True, False)


# --- the demonstrator


def test_without_slips_every_step_is_what_the_oracle_calls():
    options = {"operations": "2-16", "distractors": "0-4", "hard": "0.5"}
    for task, steps in demonstrated(60, GOLD, **options):
        for t, step in enumerate(steps[:-1]):
            assert step.calls == (next_call(task, steps[:t]),)
        assert next_call(task, steps[:-1]) is None
        assert steps[-1].text == f"The answer is {task.answer}."
        assert progress(task, steps).faithful


def test_a_demonstration_is_text_an_agent_could_have_written():
    for _, steps in demonstrated(60, Weakness(slip=0.8)):
        for step in steps[:-1]:
            (call,) = parse_calls(step.text, ["calculator"])
            assert (call,) == step.calls
            assert step.observations[0].error is None


def test_every_slip_is_tagged_and_leads_off_the_gold_program():
    kinds, slips, right_by_chance = set(), 0, 0
    for task, steps in demonstrated(300, Weakness(slip=0.8, contrast=0.5, recovery=0.0)):
        first = next((t for t, step in enumerate(steps) if step.perturbation), None)
        if first is None:
            assert progress(task, steps).faithful
            continue
        kinds.add(steps[first].perturbation)
        assert progress(task, steps[:first]).faithful
        slips += 1
        right_by_chance += reachable(task, steps, max_steps=100)
    assert kinds == {"wrong_operator", "wrong_operand", "wrong_digit", "skipped"}
    assert right_by_chance < 0.03 * slips


def test_the_slip_rate_is_that_of_the_kind():
    weakness = Weakness(slip=0.6, contrast=0.9, recovery=0.0)
    tried = dict.fromkeys(KINDS, 0)
    slipped = dict.fromkeys(KINDS, 0)
    for task, steps in demonstrated(800, weakness, hard="0.5"):
        operations = gold_problem(task).operations
        first = next((t for t, step in enumerate(steps) if step.perturbation), len(operations))
        for t, operation in enumerate(operations[: first + 1]):
            tried[operation.kind] += 1
            slipped[operation.kind] += t == first
    for kind in KINDS:
        assert slipped[kind] / tried[kind] == pytest.approx(weakness.rate(kind), abs=0.12), kind
    assert slipped["half"] / tried["half"] > 5 * slipped["gain"] / tried["gain"]


def test_a_repaired_slip_still_gives_the_right_answer():
    repaired = 0
    for task, steps in demonstrated(200, Weakness(slip=1.0, contrast=1.0, recovery=1.0)):
        if any(step.text.startswith("Wait.") for step in steps) and not steps[-1].perturbation:
            repaired += 1
            assert reachable(task, steps, max_steps=100)
    assert repaired > 50


def test_the_same_seed_gives_the_same_demonstration():
    assert demonstrated(20, Weakness()) == demonstrated(20, Weakness())


def test_a_shortcut_gives_right_answers_by_wrong_steps():
    weakness = Weakness(slip=1.0, contrast=1.0, recovery=0.0)
    lucky = 0
    for task, steps in demonstrated(200, weakness, deceptive="1", hard="0", operations="3"):
        slipped = any(step.perturbation == "wrong_operator" for step in steps)
        lucky += slipped and reachable(task, steps, max_steps=100)
    assert lucky > 80


def test_an_unknown_tool_name_is_not_faithful():
    step = acted("12+5")
    other = replace(step, calls=(ToolCall(name="python", arguments=step.calls[0].arguments),))
    assert not progress(HAND, [other]).faithful


GOLDEN_ID = "arithmetic-test-000123-64f00c9f"
GOLDEN_PROMPT = (
    "Eva has 3 books. Day 1: She buys 5 boxes of 5 books. Day 2: She finds 5 bags of 3 books. "
    "Day 3: Ben has 3 times as many. Day 4: He buys 4 bags of 4 books. He is 6 years old. "
    "Day 5: He wins 4 boxes of 3 books. How many books does Ben have?"
)
GOLDEN_ANSWER = "157"
