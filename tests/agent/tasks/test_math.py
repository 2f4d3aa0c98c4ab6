"""The mathematics domain: reading gold answers, extracting, grading."""

import asyncio
import json
import threading
import time

import pytest

from agent.tasks.math import MathDomain
from trajectory.errors import InputError
from trajectory.records import Task


@pytest.fixture(scope="module")
def domain():
    return MathDomain("unused.jsonl")


def task(answer):
    return Task(task_id="t", domain="math", prompt="p", answer=answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72.0"),
        ("1000", "$1,000"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        ("x=5", "5"),
        ("5", "x = 5"),
        (r"90^\circ", "90"),
        ("1,-2", "-2, 1"),
        (r"3 \pm 2 \sqrt{2}", r"3+2\sqrt2, 3-2\sqrt2"),
        ("(3,4]", r"\left(3, 4\right]"),
        ("2k+2", "2(k+1)"),
        (r"6 - 5i", "-5i + 6"),
        (
            r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
            r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}",
        ),
        (r"864 \mbox{ inches}^2", "864"),
        ("2516_8", "2516_{8}"),
    ],
)
def test_the_same_value_in_another_form_is_right(domain, gold, answer):
    assert asyncio.run(domain.grade(task(gold), answer)) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "73"),
        ("72", ""),
        ("72", "about seventy"),
        ("3", "3x"),
        ("2", r"2\pi"),
        (r"\frac{1}{2}", "0.51"),
        (r"\text{Evelyn}", "Navin"),
        (r"\text{(C)}", "(D)"),
        ("(3,4]", "[3,4)"),
        ("(3,4]", "(3,5]"),
        ("2k+2", "2k+1"),
        ("1,-2", "1,2"),
        ("2516_8", "2516_9"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
        ("5", "5" * 1001),
    ],
)
def test_another_value_is_wrong(domain, gold, answer):
    assert asyncio.run(domain.grade(task(gold), answer)) == 0.0


@pytest.mark.parametrize(
    "hostile",
    [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        r"\frac{" * 150 + "1" + "}{2}" * 150,
        "(" * 900,
        r"\sqrt{" * 150 + "x" + "}" * 150,
        "100000!!!",
        r"\boxed{\boxed{",
        "\x00\ud800\n",
        "__import__('os').system('true')",
    ],
)
def test_a_hostile_answer_is_wrong_and_the_next_one_is_judged(domain, hostile):
    started = time.monotonic()
    assert asyncio.run(domain.grade(task(r"\frac{1}{2}"), hostile)) == 0.0
    assert asyncio.run(domain.grade(task(r"\frac{1}{2}"), r"\frac{2}{4}")) == 1.0
    assert time.monotonic() - started < 60


def test_grading_works_outside_the_main_thread(domain):
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(asyncio.run(domain.grade(task("2k+2"), "2(k+1)")))
    )
    thread.start()
    thread.join()
    assert verdicts == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}. The answer is 2. #### 3", "1"),
        ("The answer is 2.\n#### 3", "3"),
        ("The answer is 2.", "2"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_a_box_goes_before_hashes_and_hashes_before_words(domain, text, answer):
    assert domain.extract(text) == answer


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": "She sold 48/2 = <<48/2=24>>24.\n#### 1,072"}, "1,072"),
        ({"answer": "72"}, "72"),
        ({"answer": 72}, "72"),
        ({"solution": r"So $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"answer": "3", "solution": r"\boxed{4}"}, "3"),
    ],
)
def test_gold_answers_are_read_from_both_data_sets_forms(tmp_path, row, gold):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"problem": "p", **row}))
    (loaded,) = MathDomain(str(path)).load(split="train", first=0, count=None)
    assert loaded.answer == gold


def test_a_data_set_folder_is_loaded_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"{split} {n}?", "answer": f"work\n#### {n}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domain = MathDomain(f"hf:{folder}")
    assert [t.answer for t in domain.load(split="train", first=0, count=None)] == ["0", "1", "2"]
    assert [t.prompt for t in domain.load(split="test", first=1, count=1)] == ["test 1?"]
    with pytest.raises(InputError, match="cannot load split 'validation'"):
        domain.load(split="validation", first=0, count=None)
