import json

import pytest

from benchmarks.code_gold import VARIANTS, CodeGoldConfig, check
from tests.agent.tasks.code_examples import HUMANEVAL, MBPP, write_rows
from trajectory.errors import InputError


def config(spec, **changes):
    return CodeGoldConfig(tasks=spec, allow_unsafe_tools=True, **changes)


@pytest.mark.slow
def test_wrong_gold_and_tests_that_let_anything_pass_are_found(tmp_path, capsys):
    rows = [
        HUMANEVAL,
        {**MBPP, "task_id": "wrong gold", "test_list": ["assert swap([1, 2]) == [1, 2]"]},
        {**MBPP, "task_id": "weak tests", "test_list": ["swap([1])"]},
        {**MBPP, "task_id": "odd tests", "test_list": ["assert swap(len) == 1"]},
    ]
    report = check(config(write_rows(tmp_path, *rows), out=tmp_path / "report.json"))
    assert report.tasks == 4
    assert report.gold_wrong == ["wrong gold"]
    assert report.accepted["returns None"] == ["weak tests"]
    assert report.accepted["returns another value"] == ["weak tests"]
    assert report.accepted["returns what equals anything"] == []
    assert report.accepted["exits with code 0"] == []
    assert "pass a value of type builtin_function_or_method" in report.no_verdict["odd tests"]
    assert json.loads((tmp_path / "report.json").read_text())["gold_wrong"] == ["wrong gold"]
    printed = capsys.readouterr().out
    assert "4 tasks, 1 without a verdict" in printed
    assert all(variant in printed for variant in VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first"), [("humaneval", 31), ("humaneval", 99), ("mbpp", 112)])
def test_a_sample_of_the_real_data_is_told_right_from_wrong(shared, name, first):
    spec = f"code:{shared}/data/code_tasks/{name}.jsonl"
    report = check(config(spec, first_task=first, num_tasks=4))
    assert (report.tasks, report.gold_wrong, report.no_verdict) == (4, [], {})
    assert not any(report.accepted.values())


def test_the_variants_can_be_left_out(tmp_path, capsys):
    spec = write_rows(tmp_path, {**MBPP, "test_list": ["swap([1])"]})
    report = check(config(spec, gold_only=True))
    assert (report.tasks, report.gold_wrong, report.accepted) == (1, [], {})
    assert "returns None" not in capsys.readouterr().out


def test_tasks_of_another_domain_are_refused():
    with pytest.raises(InputError, match="domain 'arithmetic': give code:FILE"):
        check(config("arithmetic"))


def test_a_concurrency_of_none_is_refused():
    with pytest.raises(InputError, match="--concurrency"):
        config("code:x.jsonl", concurrency=0)
