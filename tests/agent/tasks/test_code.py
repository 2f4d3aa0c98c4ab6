"""Reading programming tasks, and finding the code that an episode submits."""

import json

import pytest

from agent.tasks import parse_tasks
from agent.tasks.code import submission
from agent.tasks.code_tests import HiddenTests
from tests.agent.tasks.code_examples import (
    HUMANEVAL,
    MBPP,
    MBPP_OBJECTS,
    load,
    with_tests,
    write_rows,
)
from trajectory.errors import InputError
from trajectory.records import Observation, Step, ToolCall


def called(code, *, name="python"):
    call = ToolCall(name=name, arguments=json.dumps({"code": code}))
    return Step(text="", calls=(call,), observations=(Observation(content=""),))


def test_a_row_of_humaneval_becomes_a_task(tmp_path):
    (task,) = load(tmp_path, HUMANEVAL)
    assert task.task_id == "HumanEval/x"
    assert task.prompt == "Complete this Python function.\n\n" + HUMANEVAL["prompt"].strip()
    assert task.answer == (HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]).strip()
    hidden = HiddenTests.of(task)
    assert hidden.functions == ("unshift",)
    assert hidden.tests.endswith("check(unshift)\n")


def test_a_row_of_mbpp_becomes_a_task_that_shows_one_call_but_no_expected_value(tmp_path):
    (task,) = load(tmp_path, MBPP)
    assert task.task_id == "11"
    assert task.prompt == (
        "Write a function to swap the two ends of a list.\n"
        "Define the function swap. It is called like this: swap([1, 2, 3]), and returns a list."
    )
    assert task.answer == MBPP["code"].replace("\r", "")
    assert HiddenTests.of(task).tests == "\n".join(MBPP["test_list"])


def test_classes_that_the_tests_need_are_given(tmp_path):
    (task,) = load(tmp_path, MBPP_OBJECTS)
    hidden = HiddenTests.of(task)
    assert (hidden.functions, hidden.constructors, hidden.objects) == (
        ("total",), ("Pair",), ("chain",),
    )  # fmt: skip
    assert hidden.setup.strip() == ""
    assert "class Pair(object):" in task.prompt
    assert "class Node:" in task.prompt
    assert "def total" not in task.prompt


def test_plain_setup_and_imports_of_the_solution_stand_before_the_tests(tmp_path):
    row = with_tests(
        "assert f(xs) == math.floor(2.5)",
        code="import math\ndef f(x):\n    return len(x)",
        setup="xs = [1, 2]",
    )
    hidden = HiddenTests.of(load(tmp_path, row)[0])
    assert (hidden.setup, hidden.given, hidden.objects_code) == ("import math\nxs = [1, 2]", "", "")


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("assert f(2) == 3", "f(2), and returns an int."),
        ("assert f(x=2) == None", "f(x=2), and returns None."),
        ("assert f('a') == {'b': 1}", "f('a'), and returns a dict."),
        ("assert f(2)", "f(2)."),
        ("assert int(f(2, 3)) == 6", "f(2, 3)."),
        ("assert f(2) == y", "f(2)."),
        ("assert f(2) > 1", "f(2)."),
    ],
)
def test_the_example_of_a_call(tmp_path, test, said):
    (task,) = load(tmp_path, with_tests(test))
    assert task.prompt.partition("called like this: ")[2] == said


def test_code_with_a_doubtful_escape_is_read_without_a_warning(tmp_path):
    row = with_tests(r"assert f('\w') == '\w'", code="def f(x):\n    return '\\w'")
    assert load(tmp_path, row)[0].answer.endswith(r"'\w'")


def test_mbpp_has_its_published_splits(tmp_path):
    rows = [{**MBPP, "task_id": n} for n in (1, 10, 11, 510, 511, 600, 601, 974)]
    domain = parse_tasks(write_rows(tmp_path, *rows))
    ids = {
        split: [task.task_id for task in domain.load(split=split, first=0, count=None)]
        for split in ("train", "validation", "test")
    }
    assert ids == {"train": ["601", "974"], "validation": ["511", "600"], "test": ["11", "510"]}


def test_humaneval_is_one_split(tmp_path):
    domain = parse_tasks(write_rows(tmp_path, HUMANEVAL))
    for split in ("train", "validation", "test"):
        assert len(domain.load(split=split, first=0, count=None)) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "p", "answer": "a"}, "neither HumanEval .* nor MBPP"),
        ({**HUMANEVAL, "test": ""}, "'test' must hold a text"),
        ({**HUMANEVAL, "test": "def check("}, "'test' holds no Python code"),
        ({**HUMANEVAL, "canonical_solution": "    return ("}, "'solution' holds no Python code"),
        ({**MBPP, "code": "def"}, "'code' holds no Python code"),
        ({**MBPP, "code": None}, "'code' must hold a text"),
        ({**MBPP, "test_list": ["assert other(1)"]}, "calls no function that the column 'code'"),
        ({**MBPP, "test_list": "assert swap([1])"}, "calls no function that the column 'code'"),
        ({**MBPP, "test_setup_code": "x ="}, "'test_setup_code' holds no Python code"),
    ],
)
def test_a_bad_row_is_refused_with_the_line(tmp_path, row, words):
    domain = parse_tasks(write_rows(tmp_path, MBPP, row))
    with pytest.raises(InputError, match=rf"code\.jsonl, line 2: .*{words}"):
        domain.load(split="test", first=0, count=None)


def test_a_specification_without_a_file_is_refused():
    with pytest.raises(InputError, match=r"write code:FILE\.jsonl"):
        parse_tasks("code:")


F = "def f():\n    return 1\n"
G = "def f():\n    return 2\n"


@pytest.mark.parametrize(
    ("answer", "codes", "submitted"),
    [
        (f"```python\n{F}```", [], F),
        (f"```\n{F}```", [], F),
        (f"```Python3\n{F}", [], F),
        (f"```python\n{F}```\nor\n```python\n{G}```", [], G),
        (f"```python\n{F}```\nas in\n```python\nprint(f())\n```", [], F),
        (f"```json\n{F}```", [], None),
        (F, [], F),
        ("f = lambda: 1", [], "f = lambda: 1"),
        ("Done.", [], None),
        ("Done.", [F], F),
        ("Done.", [F, G], G),
        ("Done.", [F, G, "print(f())"], G),
        ("Done.", [F, "    def f(): pass", "f == 2", "g = f"], F),
        ("Done.", [f"```python\n{F}```"], F),
        (f"```python\n{F}```", [G], F),
        ("", [], None),
    ],
)
def test_the_last_code_that_defines_the_function_is_submitted(answer, codes, submitted):
    steps = [*map(called, codes), Step(text=answer)]
    assert submission(["f"], answer, steps) == submitted


def test_all_tested_functions_have_to_be_defined():
    both = F + "def g():\n    return f()\n"
    assert submission(["f", "g"], "Done.", [called(both), called(F)]) == both


def test_calls_of_other_tools_and_without_code_are_passed_over():
    odd = Step(
        text="",
        calls=tuple(ToolCall(name="python", arguments=a) for a in ("{", "[1]", "{}")),
        observations=(Observation(content=""),) * 3,
    )
    assert submission(["f"], "Done.", [called(F), called(G, name="sql"), odd]) == F
