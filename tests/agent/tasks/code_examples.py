"""Programming tasks for tests, in both formats, and running the checker on candidates."""

import asyncio
import json

from agent.sandbox import SandboxProvider
from agent.tasks import parse_tasks

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": (
        "from typing import List\n\n\n"
        "def shift(n: int) -> int:\n    return n + 1\n\n\n"
        'def unshift(ns: List[int]) -> List[int]:\n    """ Undo shift for each. """\n'
    ),
    "entry_point": "unshift",
    "canonical_solution": "    return [n - 1 for n in ns]\n",
    "test": (
        "METADATA = {}\n\n\ndef check(candidate):\n"
        "    import random\n"
        "    assert candidate([]) == []\n"
        "    for _ in range(5):\n"
        "        n = random.randrange(10**6)\n"
        "        assert candidate([shift(n), shift(shift(n))]) == [n, n + 1]\n"
    ),
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to swap the two ends of a list.",
    "code": "def swap(items):\r\n  return items[-1:] + items[1:-1] + items[:1]",
    "test_setup_code": "",
    "test_list": [
        "assert swap([1, 2, 3]) == [3, 2, 1]",
        "assert swap([4, 5]) == [5, 4]",
        "assert swap(['a', 'b', 'c', 'd']) == ['d', 'b', 'c', 'a']",
    ],
    "challenge_test_list": [],
}
MBPP_OBJECTS = {
    "task_id": 12,
    "text": "Write a function to sum a list of pairs and a chain.",
    "code": (
        "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
        "class Node:\n    def __init__(self, n):\n        self.n, self.next = n, None\n"
        "def total(pairs, chain):\n    s = sum(p.a + p.b for p in pairs)\n"
        "    while chain:\n        s, chain = s + chain.n, chain.next\n    return s"
    ),
    "test_setup_code": "chain = Node(1)\r\nchain.next = Node(2)",
    "test_list": ["assert total([Pair(1, 2), Pair(3, b=4)], chain) == 13"],
}


def write_rows(folder, *rows):
    """Write a file of rows and return the specification of its tasks."""
    path = folder / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"code:{path}"


def load(folder, *rows):
    """The tasks of rows, whatever their split."""
    rows = [{**row, "split": "test"} for row in rows]
    return parse_tasks(write_rows(folder, *rows)).load(split="test", first=0, count=None)


def with_tests(*tests, code="def f(x):\n    return x", setup=""):
    """A row in the format of MBPP."""
    return {**MBPP, "code": code, "test_list": list(tests), "test_setup_code": setup}


def verdicts(folder, row, answers, *, backend="auto"):
    """The verdicts on several answers to one task, each in fresh boxes of one sandbox."""

    async def run():
        sandbox = SandboxProvider(backend, allow_unsafe=True)
        domain = parse_tasks(write_rows(folder, {**row, "split": "test"}), sandbox)
        (task,) = domain.load(split="test", first=0, count=None)
        try:
            return [await domain.grade(task, answer) for answer in answers]
        finally:
            await sandbox.close()

    return asyncio.run(run())
