"""What every task domain must do: above all, accept gold and reject perturbed gold."""

import asyncio
import json
import re

import pytest

from agent.tasks import DOMAINS, parse_tasks

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


@pytest.fixture(params=sorted(DOMAINS))
def domain(request, tmp_path):
    """Each row of the table on a source of its own kind."""
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    spec = {"arithmetic": "arithmetic"}.get(request.param, f"{request.param}:{path}")
    return parse_tasks(spec)


def tasks_of(domain):
    return domain.load(split="test", first=0, count=len(ROWS))


def perturbed(gold):
    """Return answers of another value: a number changed, or other words."""
    numbers = [m for m in re.finditer(r"\d+", gold) if not re.search(r"_\{?$", gold[: m.start()])]
    for match in (numbers[0], numbers[-1]) if numbers else ():
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
        assert asyncio.run(domain.grade(task, task.answer)) == 1.0
        for answer in perturbed(task.answer):
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
