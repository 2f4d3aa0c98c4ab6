"""Planning: the state decides; gold plans pass and perturbed ones fail on every row of the data."""

import asyncio
import gzip
import json
from dataclasses import replace
from fractions import Fraction

import pytest

from agent.tasks import parse_tasks
from agent.tasks.planning_blocks import reached_in_words
from agent.tasks.planning_blocks import read_row as read_blocks
from agent.tasks.planning_countdown import read_row as read_countdown
from agent.tools import build_tools
from trajectory.errors import InputError
from trajectory.records import Step, Task, ToolCall

PDDL = """
(define (problem p) ; a comment (with parentheses
 (:domain blocksworld-4ops) (:objects a b c)
 (:init (handempty) (ontable A) (on b c) (ontable c) (clear a) (clear b))
 (:goal (and (on c b) (on b a))))
"""
PLAN = ["unstack b from c", "stack b on a", "pick-up c", "stack c on b"]


@pytest.fixture
def domain(tmp_path):
    """Makes a domain of one kind on a file of rows."""

    def make(kind, *rows):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return parse_tasks(f"planning:{kind}:{path}")

    return make


def first(domain):
    return domain.load(split="test", first=0, count=1)[0]


@pytest.fixture
def blocks(domain):
    made = domain("blocksworld", {"instance_id": 7, "problem_pddl": PDDL})
    return made, first(made)


@pytest.fixture
def countdown(domain):
    made = domain("countdown", {"id": "c", "input": "30,100,93", "output": "23"})
    return made, first(made)


def episode(task, tool_name, argument, values):
    """The steps of an episode that really makes these calls."""
    (tool,) = build_tools([tool_name])

    async def play():
        session = await tool.open(task, 0)
        steps = []
        for value in values:
            arguments = {argument: value}
            call = ToolCall(name=tool_name, arguments=json.dumps(arguments))
            steps.append(
                Step(text="", calls=(call,), observations=(await session.call(arguments),))
            )
        return [*steps, Step(text="The goal holds.")]

    return asyncio.run(play())


def verdict(domain, task, values, answer="The goal holds.", *, kind="blocks"):
    argument = {"blocks": "action", "countdown": "step"}[kind]
    steps = episode(task, kind, argument, values)
    return asyncio.run(domain.grade(task, answer, steps))


def test_the_prompt_tells_rules_state_and_goal_in_words(blocks):
    _, task = blocks
    assert task.task_id == "7"
    assert task.prompt.splitlines()[1:] == [
        "Now: Hand: empty. On the table: a, c. Stacked: b on c. Clear: a, b.",
        "Goal: c on b, b on a.",
    ]
    assert task.answer == "c on b, b on a"


def test_the_prompt_tells_numbers_and_target(countdown):
    _, task = countdown
    assert (task.task_id, task.answer) == ("c", "23")
    assert task.prompt.startswith("Make 23 from the numbers 30, 100, 93. Use each of them exactly")


def test_the_state_that_the_calls_brought_about_decides(blocks):
    domain, task = blocks
    assert verdict(domain, task, PLAN) == 1.0
    assert verdict(domain, task, PLAN[:-1]) == 0.0
    assert verdict(domain, task, [*PLAN, "unstack c from b"]) == 0.0


def test_a_claim_without_the_state_is_wrong(blocks, countdown):
    for domain, task in (blocks, countdown):
        for answer in ("Done.", "The goal holds.", task.answer, task.prompt, "", "\x00"):
            assert asyncio.run(domain.grade(task, answer, [Step(text=answer)])) == 0.0


def test_refused_and_unreadable_calls_change_nothing(blocks):
    domain, task = blocks
    assert verdict(domain, task, ["pick-up c", "fly", *PLAN, "put-down a"]) == 1.0


def test_calls_that_never_reached_the_tool_do_not_count(blocks):
    domain, task = blocks
    steps = episode(task, "blocks", "action", PLAN)
    unknown = [
        replace(s, observations=tuple(replace(o, error="unknown_tool") for o in s.observations))
        for s in steps
    ]
    assert asyncio.run(domain.grade(task, "Done.", steps)) == 1.0
    assert asyncio.run(domain.grade(task, "Done.", unknown)) == 0.0


def test_arguments_that_are_no_object_change_nothing(blocks):
    domain, task = blocks
    steps = episode(task, "blocks", "action", PLAN)
    for text in ("not json", "[1]", '"pick-up a"'):
        odd = replace(steps[0], calls=(ToolCall(name="blocks", arguments=text),))
        assert asyncio.run(domain.grade(task, "Done.", [odd, *steps])) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "\n".join(PLAN),
        "Plan:\n"
        + "\n".join(f"{n}. {action}" for n, action in enumerate(PLAN, 1))
        + "\nThat is it.",
        "(unstack b c) (stack b a) (pick-up c) (stack c b)",
    ],
)
def test_without_any_call_a_whole_plan_in_the_answer_is_judged(blocks, answer):
    domain, task = blocks
    assert asyncio.run(domain.grade(task, answer)) == 1.0
    assert asyncio.run(domain.grade(task, answer.replace("pick", "fly"))) == 0.0
    assert verdict(domain, task, PLAN[:1], answer) == 0.0


def test_an_impossible_action_spoils_a_written_plan(blocks):
    domain, task = blocks
    assert asyncio.run(domain.grade(task, "\n".join(["pick-up c", *PLAN]))) == 0.0


def test_a_goal_that_holds_from_the_start_needs_no_action(domain):
    pddl = PDDL.replace("(on c b) (on b a)", "(on b c)")
    made = domain("blocksworld", {"instance_id": 1, "problem_pddl": pddl})
    assert asyncio.run(made.grade(first(made), "Nothing to do.")) == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(30 + 93) - 100", 1.0),
        ("Answer: 30 + 93 - 100 = 23", 1.0),
        (r"\boxed{93 - 100 + 30}", 1.0),
        ("I add.\n93-(100-30)", 1.0),
        ("23", 0.0),
        ("100 - 77", 0.0),
        ("30 + 93 - 100 + 0", 0.0),
        ("30 + 93 - 10", 0.0),
        ("100 - 93 + 30", 0.0),
        ("(100 - 93) // 30 + 23", 0.0),
        ("30 + 93 - 100 if 1 else 2", 0.0),
        ("30 + 93 - (100", 0.0),
    ],
)
def test_without_any_call_an_expression_in_the_answer_is_judged(countdown, answer, right):
    domain, task = countdown
    assert asyncio.run(domain.grade(task, answer)) == right


def test_countdown_needs_every_number(domain):
    made = domain("countdown", {"numbers": [23, 1, 1], "target": 23})
    task = first(made)
    assert verdict(made, task, ["1 - 1"], kind="countdown") == 0.0
    assert verdict(made, task, ["1 - 1", "23 + 0"], kind="countdown") == 1.0


def test_splits_are_those_of_the_file(domain):
    rows = [{"input": "1,2", "output": str(n), "split": s} for n, s in ((3, "train"), (2, "test"))]
    made = domain("countdown", *rows)
    assert [t.answer for t in made.load(split="train", first=0, count=None)] == ["3"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "'problem_pddl' must hold"),
        ({"problem_pddl": "(define"}, "do not match"),
        ({"problem_pddl": "define"}, "do not match"),
        ({"problem_pddl": "(define))"}, "do not match"),
        ({"problem_pddl": "(define (:init (ontable a)))"}, "0 sections :goal"),
        ({"problem_pddl": "(define (:init (ontable a)) (:goal))"}, "the goal names nothing"),
        ({"problem_pddl": "(define (:init (ontable a)) (:goal (clear b)))"}, "the goal names b"),
        ({"problem_pddl": "(define (:init (ontable a)) (:goal (not (clear a))))"}, "only facts"),
        ({"problem_pddl": "(define (:init (on a b)) (:goal (clear a)))"}, "cannot be so"),
    ],
)
def test_a_bad_blocksworld_row_is_refused_with_the_line(domain, row, words):
    with pytest.raises(InputError, match=rf"blocksworld\.jsonl, line 2: .*{words}"):
        first(domain("blocksworld", {"instance_id": 1, "problem_pddl": PDDL}, row))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "must hold 2 to 10 numbers"),
        ({"input": "3", "output": "3"}, "must hold 2 to 10 numbers"),
        ({"input": "3,x", "output": "3"}, "'x' is no whole number"),
        ({"input": "3,-4", "output": "3"}, "'-4' is no whole number"),
        ({"input": "3,4"}, "None is no whole number"),
        ({"input": "3,4", "output": 1.5}, "1.5 is no whole number"),
    ],
)
def test_a_bad_countdown_row_is_refused_with_the_line(domain, row, words):
    with pytest.raises(InputError, match=rf"countdown\.jsonl, line 2: .*{words}"):
        first(domain("countdown", {"input": "1,2", "output": "3"}, row))


@pytest.mark.parametrize("spec", ["planning", "planning:blocksworld", "planning:chess:f.jsonl"])
def test_a_specification_without_kind_or_file_is_refused_with_the_form(spec):
    with pytest.raises(InputError, match=r"write planning:blocksworld:FILE\.jsonl or"):
        parse_tasks(spec)


def test_a_task_of_another_domain_is_refused(blocks, countdown):
    alien = Task(task_id="t", domain="d", prompt="p", answer="a")
    for domain, _ in (blocks, countdown):
        with pytest.raises(InputError, match="'t' has no"):
            asyncio.run(domain.grade(alien, "Done."))


@pytest.mark.slow
def test_every_gold_plan_of_planbench_passes_and_perturbed_ones_fail(shared):
    domain = parse_tasks(
        f"planning:blocksworld:{shared}/data/planbench_blocksworld/instances.jsonl"
    )
    tasks = domain.load(split="test", first=0, count=None)
    without_plan = [task.task_id for task in tasks if "plan" not in task.meta["blocks"]]
    assert (len(tasks), without_plan) == (501, ["501"])
    for task in tasks[:500]:
        about = task.meta["blocks"]
        plan = about["plan"]
        assert verdict(domain, task, plan) == 1.0, task.task_id
        assert asyncio.run(domain.grade(task, "\n".join(plan))) == 1.0, task.task_id
        for n in range(len(plan)):
            dropped = plan[:n] + plan[n + 1 :]
            swapped = plan[:n] + plan[n : n + 2][::-1] + plan[n + 2 :]
            assert verdict(domain, task, dropped) == 0.0, (task.task_id, n)
            assert n + 1 == len(plan) or verdict(domain, task, swapped) == 0.0, (task.task_id, n)
        kind, *names = about["goal"][0].split()
        other = replace(task, meta={"blocks": {**about, "goal": [" ".join([kind, *names[::-1]])]}})
        assert verdict(domain, other, plan) == 0.0, task.task_id


def test_written_plans_of_models_get_the_verdict_of_another_simulator(shared):
    folder = shared / "data" / "planbench_blocksworld"
    with (folder / "instances.jsonl").open() as lines:
        rows = [read_blocks(json.loads(line)) for line in lines]
    tasks = {
        row["id"]: Task(task_id="t", domain="planning", prompt="p", answer="a", meta=row)
        for row in rows
    }
    compared = right = 0
    with gzip.open(folder / "llm_plans.jsonl.gz", "rt") as lines:
        for line in lines:
            plan = json.loads(line)
            reached = reached_in_words(tasks[plan["instance_id"]], "\n".join(plan["plan"] or []))
            assert reached == plan["goal_reached"], plan
            compared, right = compared + 1, right + reached
    assert (compared, right) == (8412, 2758)


def solutions(numbers, target):
    """Sequences of steps that use all the numbers and end at the target."""
    if len(numbers) == 1:
        if numbers[0] == target:
            yield []
        return
    for i, first_number in enumerate(numbers):
        for j, second in enumerate(numbers):
            if i == j:
                continue
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for symbol in "+-*/":
                if symbol == "/" and second == 0:
                    continue
                result = {
                    "+": first_number + second,
                    "-": first_number - second,
                    "*": first_number * second,
                    "/": first_number / (second or 1),
                }[symbol]
                for steps in solutions([*rest, result], target):
                    yield [f"{first_number} {symbol} {second}", *steps]


def test_every_row_of_countdown_can_be_solved_and_perturbed_solutions_fail(shared):
    domain = parse_tasks(f"planning:countdown:{shared}/data/countdown/countdown_cd3_test.jsonl")
    tasks = domain.load(split="test", first=0, count=None)
    assert len(tasks) == 256
    for task in tasks:
        about = task.meta["countdown"]
        steps = next(solutions([Fraction(n) for n in about["numbers"]], about["target"]))
        assert verdict(domain, task, steps, kind="countdown") == 1.0, task.task_id
        assert verdict(domain, task, steps[:-1], kind="countdown") == 0.0, task.task_id
        assert verdict(domain, task, steps[1:], kind="countdown") == 0.0, task.task_id
        other = {"countdown": {**about, "target": about["target"] + 1}}
        assert verdict(domain, replace(task, meta=other), steps, kind="countdown") == 0.0


def test_rows_of_both_kinds_keep_no_column_that_is_not_used():
    assert read_countdown({"input": "1,2", "output": "3", "note": "x"}).keys() == {
        "problem", "answer", "countdown",
    }  # fmt: skip
    assert read_blocks({"problem_pddl": PDDL, "query": "long"}).keys() == {
        "id", "problem", "answer", "blocks",
    }  # fmt: skip
