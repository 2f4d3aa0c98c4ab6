"""What every task domain must do: above all, accept gold and reject perturbed gold."""

import asyncio
import json
import re

import pytest

from agent.sandbox import SandboxProvider
from agent.tasks import DOMAINS, parse_tasks
from agent.tools.sql_database import database_from_script

DATA_FILES = [
    "math_competition/math500",
    "math_competition/aime24",
    "math_competition/aime25",
    "math_competition/amc23",
    "gsm8k/test",
]
NUM_SAMPLED = 60
ROWS = [
    {"problem": "2 + 3?", "answer": "5"},
    {"problem": "Half?", "answer": "0.5"},
    {"problem": "A thousand?", "answer": "1,000"},
    {"problem": "Minus four?", "answer": "-4"},
]
ITEMS = "CREATE TABLE items(id, name); INSERT INTO items VALUES (1, 'a'), (2, 'b'), (3, 'c');"
QUERIES = [
    "SELECT sum(id) FROM items WHERE id < 3",
    "SELECT name FROM items WHERE id = 2",
    "SELECT id + 5 FROM items",
    "SELECT id FROM items ORDER BY id LIMIT 2",
]
UNSAFE = SandboxProvider("unsafe", allow_unsafe=True)


def sql_rows(folder):
    """Questions about a database that lies in the folder."""
    (folder / "database").mkdir()
    (folder / "database" / "items.sqlite").write_bytes(database_from_script(ITEMS))
    return [{"question": f"{q}?", "query": q, "db_id": "items"} for q in QUERIES]


def code_rows(folder):
    """Functions that multiply."""
    return [
        {
            "task_id": number,
            "text": f"Write a function to multiply by {number}.",
            "code": f"def times(x):\n    return x * {number}",
            "test_list": [f"assert times(3) == {3 * number}", f"assert times(1) == {number}"],
            "split": "test",
        }
        for number in (2, 5, 10, 11)
    ]


def blocksworld_rows(folder):
    """Two towers whose upper block is to go elsewhere."""
    init = "(handempty) (on b1 b2) (ontable b2) (ontable b3) (clear b1) (clear b3)"
    plans = {
        "(on b1 b3)": ["(unstack b1 b2)", "(stack b1 b3)"],
        "(ontable b1)": ["(unstack b1 b2)", "(put-down b1)"],
        "(holding b3)": ["(pick-up b3)"],
        "(on b3 b1)": ["(pick-up b3)", "(stack b3 b1)"],
    }
    return [
        {
            "instance_id": number,
            "problem_pddl": f"(define (problem p) (:init {init}) (:goal (and {goal})))",
            "ground_truth_plan": plan,
        }
        for number, (goal, plan) in enumerate(plans.items())
    ]


EXPRESSIONS = {"23": "(30 + 93) - 100", "7": "14 / 2", "60": "(3 + 9) * 5", "0": "8 - 8"}


def countdown_rows(folder):
    """A row for each of the expressions."""
    return [
        {"input": ",".join(re.findall(r"\d+", text)), "output": target}
        for target, text in EXPRESSIONS.items()
    ]


ROWS_OF = {
    "code": code_rows,
    "planning:blocksworld": blocksworld_rows,
    "planning:countdown": countdown_rows,
    "sql": sql_rows,
}
"""Domains whose rows are not problem and answer alone."""
KINDS = {"planning": ["planning:blocksworld", "planning:countdown"]}
"""Domains of several kinds of rows."""


def gold_of(task):
    """An answer that is right: where the goal is a state, a plan that leads to it."""
    if "blocks" in task.meta:
        return "\n".join(task.meta["blocks"]["plan"])
    return EXPRESSIONS[task.answer] if "countdown" in task.meta else task.answer


@pytest.fixture(params=[kind for name in sorted(DOMAINS) for kind in KINDS.get(name, [name])])
def domain(request, tmp_path):
    """Each row of the table on a source of its own kind."""
    path = tmp_path / "tasks.jsonl"
    rows = ROWS_OF.get(request.param, lambda folder: ROWS)(tmp_path)
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = {"arithmetic": "arithmetic"}.get(request.param, f"{request.param}:{path}")
    return parse_tasks(spec, UNSAFE)


def tasks_of(domain):
    return domain.load(split="test", first=0, count=len(ROWS))


def perturbed(gold):
    """Return answers of another value: a number changed, or other words."""
    numbers = [m for m in re.finditer(r"\d+", gold) if not re.search(r"_\{?$", gold[: m.start()])]
    for match in dict.fromkeys((numbers[0], numbers[-1])) if numbers else ():
        exponent_of_a_unit = re.search(r"(?:box|text)\{[^}]*\}\s*\^\{?$", gold[: match.start()])
        if not exponent_of_a_unit:
            yield gold[: match.start()] + str(int(match[0]) + 1) + gold[match.end() :]
            yield gold[: match.start()] + match[0] + "7" + gold[match.end() :]
    if not numbers:
        yield "elsewhere" if gold.isalpha() or r"\text" in gold else f"{gold} + 1"


def test_the_domain_says_its_name_prompt_and_tools(domain):
    assert domain.name in DOMAINS
    assert domain.system_prompt
    assert domain.default_tools


def test_tasks_are_durable_and_know_their_domain(domain):
    tasks = tasks_of(domain)
    assert len({task.task_id for task in tasks}) == len(ROWS)
    assert {task.domain for task in tasks} == {domain.name}
    assert [t.task_id for t in tasks] == [t.task_id for t in tasks_of(domain)]
    assert tasks[1:3] == domain.load(split="test", first=1, count=2)


def test_gold_is_right_and_perturbed_gold_is_wrong(domain):
    for task in tasks_of(domain):
        gold = gold_of(task)
        assert asyncio.run(domain.grade(task, gold)) == 1.0
        for answer in perturbed(gold):
            assert asyncio.run(domain.grade(task, answer)) == 0.0, answer


def test_an_odd_answer_is_wrong_and_not_an_error(domain):
    (task,) = tasks_of(domain)[:1]
    for answer in ("", " ", "\x00", "\ud800", "{" * 500, "9" * 5000, "9**9**9", "\U0001f600"):
        assert asyncio.run(domain.grade(task, answer)) == 0.0


def test_no_text_breaks_the_extraction(domain):
    for text in ("", "\n", "\\boxed{", "####", "Answer:", "\x00", "<tool_call>{}</tool_call>"):
        assert domain.extract(text) is None or isinstance(domain.extract(text), str)


@pytest.mark.parametrize("name", DATA_FILES)
def test_real_gold_is_right_and_perturbed_gold_is_wrong(shared, name):
    domain = parse_tasks(f"math:{shared}/data/{name}.jsonl")
    tasks = domain.load(split="test", first=0, count=None)
    for task in tasks[:: max(1, len(tasks) // NUM_SAMPLED)]:
        boxed = domain.extract(f"Thus the answer is $\\boxed{{{task.answer}}}$.")
        assert asyncio.run(domain.grade(task, boxed)) == 1.0, task.answer
        for answer in perturbed(task.answer):
            assert asyncio.run(domain.grade(task, answer)) == 0.0, (task.answer, answer)
