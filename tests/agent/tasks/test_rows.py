"""Reading task files, good and bad."""

import json

import pytest

from agent.tasks import parse_tasks
from trajectory.errors import InputError


@pytest.fixture(params=["math:{}", "{}"], ids=["math", "jsonl"])
def load(request, tmp_path):
    """Write lines to a file and load it through either file domain."""

    def run(lines, *, split="test", first=0, count=None):
        path = tmp_path / "tasks.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        domain = parse_tasks(request.param.format(path))
        return domain.load(split=split, first=first, count=count)

    return run


ROWS = [{"id": f"r{n}", "problem": f"What is {n}?", "answer": str(n)} for n in range(5)]


def test_columns_become_task_and_meta(load):
    (task,) = load([{"id": 7, "question": "2 + 2?", "answer": 4, "level": 1, "subject": "sums"}])
    assert (task.task_id, task.prompt, task.answer) == ("7", "2 + 2?", "4")
    assert task.meta == {"level": 1, "subject": "sums"}


def test_a_range_is_returned_in_file_order(load):
    assert [task.task_id for task in load(ROWS, first=1, count=3)] == ["r1", "r2", "r3"]


def test_empty_lines_are_skipped(load):
    assert len(load([ROWS[0], "", ROWS[1], "  "])) == 2


def test_without_an_id_the_content_names_the_task(load):
    first, second = load([{"problem": "p", "answer": "1"}, {"problem": "p", "answer": "2"}])
    assert len(first.task_id) == 16
    assert first.task_id != second.task_id
    assert load([{"answer": "1", "problem": "p"}])[0].task_id == first.task_id


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_file_without_splits_is_returned_whole_for_each(load, split):
    assert len(load(ROWS, split=split)) == 5


def test_the_split_column_selects(load):
    rows = [{**row, "split": "train" if n < 2 else "test"} for n, row in enumerate(ROWS)]
    assert [task.task_id for task in load(rows, split="train")] == ["r0", "r1"]
    with pytest.raises(InputError, match=r"no row of split 'validation'; it has test, train"):
        load(rows, split="validation")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROWS[0], "{not json"], r"tasks\.jsonl, line 2: not JSON"),
        ([ROWS[0], "", "[1, 2]"], r"line 3: a row must be a JSON object, not list"),
        ([{"answer": "1"}], r"line 1: no problem: .*problem, question, prompt"),
        ([{"problem": " ", "answer": "1"}], r"line 1: no problem"),
        ([{"problem": "p"}], r"line 1: no answer: the column 'answer'"),
        ([{"problem": "p", "answer": ""}], r"line 1: no answer"),
        ([{"problem": "p", "answer": None}], r"line 1: no answer"),
        ([{"problem": "p", "answer": [1]}], r"line 1: no answer"),
        ([{"problem": "p", "answer": "1", "id": 1.5}], r"line 1: the column 'id'"),
        ([ROWS[0], ROWS[1], ROWS[0]], r"line 3: the id 'r0' was used before in .*line 1"),
        ([{**ROWS[0], "split": "test"}, ROWS[1]], r"1 of 2 rows have a column 'split'"),
        ([], r"holds no task"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(load, lines, message):
    with pytest.raises(InputError, match=message):
        load(lines)


@pytest.mark.parametrize(("first", "count"), [(0, 6), (5, None), (3, 3), (-1, 2)])
def test_too_few_tasks_are_refused_with_the_number(load, first, count):
    with pytest.raises(InputError, match="has 5 tasks"):
        load(ROWS, first=first, count=count)


@pytest.mark.parametrize("prefix", ["math:", ""])
def test_a_missing_file_is_named(prefix, tmp_path):
    with pytest.raises(InputError, match=r"no file .*absent\.jsonl"):
        parse_tasks(f"{prefix}{tmp_path}/absent.jsonl").load(split="test", first=0, count=None)


def test_a_folder_and_a_binary_file_are_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, words in (("folder", "is a folder"), ("binary", "as UTF-8 text")):
        with pytest.raises(InputError, match=words):
            parse_tasks(f"{tmp_path}/{name}.jsonl").load(split="test", first=0, count=None)
