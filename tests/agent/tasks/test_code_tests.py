"""Hidden tests: what passes, what cannot pass, and when there is no verdict."""

import asyncio
import tempfile

import pytest

from agent.sandbox import SandboxProvider
from agent.tasks import parse_tasks
from agent.tools.base import ToolFailure
from tests.agent.tasks.code_examples import (
    HUMANEVAL,
    MBPP,
    MBPP_OBJECTS,
    load,
    verdicts,
    with_tests,
    write_rows,
)
from trajectory.errors import InputError
from trajectory.records import Task

SECRET = "the expected text 7391"
GUARDED = with_tests(
    f"assert f(1) == {SECRET!r}",
    f"assert f(2) == {SECRET!r}",
    "assert f(2) != 0",
    code="def f(x):\n    return x",
)
RIGHT = f"def f(x): return {SECRET!r}"

FINDER = (
    "import gc, sys\n"
    "def f(x):\n"
    "    found = []\n"
    "    frame = sys._getframe()\n"
    "    todo, seen = [frame, sys.modules], set()\n"
    "    while frame:\n"
    "        todo += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]\n"
    "        frame = frame.f_back\n"
    "    todo += gc.get_objects()\n"
    "    for item in todo:\n"
    "        for part in (item, *gc.get_referents(item)):\n"
    "            if isinstance(part, str) and 'expected' + ' text 7' in part:\n"
    "                found.append(part)\n"
    "    return found[0][found[0].index('the expected'):][:22] if found else None"
)
CHEATS = {
    "nothing": "f = None",
    "none": "def f(x): return None",
    "exits with code 0 when defined": "import sys\ndef f(x): return 1\nsys.exit(0)",
    "exits with code 0 when called": "import sys\ndef f(x): sys.exit(0)",
    "ends the process when defined": "import os\ndef f(x): return 1\nos._exit(0)",
    "ends the process when called": "import os\ndef f(x): os._exit(0)",
    "ends the process at exit": (
        "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 1"
    ),
    "prints the expected text": f"def f(x):\n    print({SECRET!r})",
    "is equal to everything": (
        "class Any:\n    __eq__ = __ne__ = lambda self, other: True\n"
        "    __hash__ = lambda self: 0\n"
        "def f(x): return Any()"
    ),
    "is a list equal to everything": (
        "class Any(list):\n    __eq__ = __ne__ = lambda self, other: True\ndef f(x): return Any()"
    ),
    "is a text equal to everything": (
        "class Any(str):\n    __eq__ = __ne__ = lambda self, other: True\n"
        "    __hash__ = str.__hash__\ndef f(x): return Any()"
    ),
    "claims to be a text": (
        "class Any:\n    __class__ = str\n    __eq__ = lambda self, other: True\n"
        "def f(x): return Any()"
    ),
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.isinstance = lambda *a: True\n"
        "builtins.exec = builtins.compile = builtins.print = lambda *a, **k: None\n"
        "builtins.len = builtins.all = lambda *a: 1\ndef f(x): return 1"
    ),
    "patches json": (
        'import json\njson.dumps = lambda *a, **k: \'{"ended": "passed", "needed": []}\'\n'
        "json.loads = lambda *a, **k: {}\ndef f(x): return 1"
    ),
    "patches the program beside it": (
        "import sys\nmain = sys.modules['__main__']\n"
        "main.encode = lambda value: 'x'\nmain.decode = lambda *a: None\n"
        "main.Judge = main.Stop = None\ndef f(x): return 1"
    ),
    "replaces check and its own name": (
        "import sys\ndef check(candidate): return True\n"
        "sys.modules['__main__'].__dict__.update(check=check, box=None)\ndef f(x): return 1"
    ),
    "asks for names beside the candidate": (
        "import sys\nsys.modules['__main__'].encode = lambda value: {'name': 'f'}\n"
        "def f(x): return 1"
    ),
    "raises what ends loops": "def f(x): raise StopIteration",
    "raises what ends the tests": "def f(x): raise SystemExit(0)",
    "raises an assertion error": "def f(x): raise AssertionError",
    "takes for ever": "def f(x):\n    while True: pass",
    "prints for ever": "import os\ndef f(x):\n    while True: os.write(1, b'x' * 65536)",
    "returns too much": "def f(x): return 'x' * 10_000_000",
    "returns a ring": "def f(x):\n    ring = []\n    ring.append(ring)\n    return ring",
    "is no Python": "def f(x):\n    return ((",
    "holds a NUL": "def f(x):\n    return '\x00'",
    "holds half a character": "def f(x):\n    return '\ud800'",
    "looks for the expected text in memory": FINDER,
    "looks for the expected text in files": (
        "import glob, os\n"
        "def f(x):\n"
        "    for name in glob.glob('**/*', recursive=True) + glob.glob('../**/*.jsonl'):\n"
        "        if os.path.isfile(name) and 'expected' + ' text 7' in open(name).read():\n"
        "            return 'the expected' + ' text 7391'\n"
    ),
}


@pytest.fixture(scope="module")
def cheated(tmp_path_factory):
    """The verdict on each cheat, and on the right answer before, among and after them."""
    answers = [RIGHT]
    for cheat in CHEATS.values():
        answers += [cheat, RIGHT]
    found = verdicts(tmp_path_factory.mktemp("cheats"), GUARDED, answers)
    assert set(found[::2]) == {1.0}
    return dict(zip(CHEATS, found[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(cheated, name):
    assert cheated[name] == 0.0


def test_the_search_of_memory_finds_a_text_that_is_there(tmp_path):
    row = {
        **HUMANEVAL,
        "prompt": f"TEXT = {SECRET!r}\n\n\ndef f(x):\n    pass\n",
        "entry_point": "f",
        "test": f"def check(candidate):\n    assert candidate(1) == {SECRET!r}",
    }
    assert verdicts(tmp_path, row, [FINDER]) == [1.0]


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, MBPP_OBJECTS], ids=["a", "b", "c"])
def test_gold_passes_and_other_code_does_not(tmp_path, row):
    (task,) = load(tmp_path, row)
    name = task.meta["code"]["functions"][0]
    off = f"{task.answer}\ngold = {name}\ndef {name}(*a): return gold(*a) and 0"
    answers = [task.answer, f"{task.answer}\ndef {name}(*a): pass", off, "Done."]
    assert verdicts(tmp_path, row, answers) == [1.0, 0.0, 0.0, 0.0]


def test_without_isolation_the_verdicts_are_the_same(tmp_path):
    answers = [RIGHT, CHEATS["is a list equal to everything"], CHEATS["patches builtins"], RIGHT]
    assert verdicts(tmp_path, GUARDED, answers, backend="unsafe") == [1.0, 0.0, 0.0, 1.0]


def test_what_the_task_gives_need_not_be_repeated(tmp_path):
    answer = "def unshift(ns: List[int]):\n    return [n - 2 + shift(0) for n in ns]"
    assert verdicts(tmp_path, HUMANEVAL, [answer]) == [1.0]


def test_helpers_of_the_task_that_a_candidate_replaces_are_its_own_alone(tmp_path):
    answer = "def shift(n): return n\ndef unshift(ns): return ns"
    assert verdicts(tmp_path, HUMANEVAL, [answer]) == [0.0]


def test_candidates_may_print_and_keep_names_of_their_own(tmp_path):
    answer = (
        "import sys\nprint('defined')\nbox = json = encode = 3\n"
        "def decode(x): return x\n"
        "if __name__ == '__main__':\n    raise SystemExit(input())\n"
        "def f(x):\n    print('called', x)\n    sys.stdout.buffer.write(b'more')\n"
        "    return decode(x)"
    )
    assert verdicts(tmp_path, with_tests("assert f((1, {2})) == (1, {2})"), [answer]) == [1.0]


CASES = [
    ("calls start from the same state", "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n",
     ["assert f(1) == 1", "assert f(2) == 1"]),
    ("the same call is made once", "import random\ndef f(x): return random.random()",
     ["assert f(1) == f(1)"]),
    ("arguments are copies", "def f(x):\n    x.append(9)\n    return len(x)",
     ["x = [1]", "assert f(x) == 2", "assert x == [1]"]),
    ("built-in exceptions arrive", "def f(x): return {}[x]",
     ["try:\n    f(1)\n    raise SystemError\nexcept KeyError:\n    pass"]),
    ("other exceptions arrive as the nearest", "class Odd(ValueError): pass\ndef f(x): raise Odd",
     ["try:\n    f(1)\n    raise SystemError\nexcept ValueError:\n    pass"]),
    ("exceptions that need arguments arrive", "def f(x): return b'\\xff'.decode()",
     ["try:\n    f(1)\n    raise SystemError\nexcept UnicodeDecodeError:\n    pass"]),
    ("the tests may be a loop", "def f(x): return x + 1",
     ["assert all(f(n) == n + 1 for n in range(12))"]),
    ("calls may depend on values", "def f(x): return x + 1",
     ["assert f(f(f(0))) == 3", "while f(9) != 10: pass"]),
    ("names may be keywords", "def f(x, *, y=1): return x + y",
     ["assert f(1, y=2) == 3", "assert f(x=1) == 2"]),
    ("numbers need not be finite", "def f(x): return x * float('inf')",
     ["assert f(1) == float('inf')", "assert f(float('nan')) != 1"]),
    ("types are kept", "def f(x): return x",
     ["assert f(1) is not True", "assert type(f((1.0,))[0]) is float", "assert f(True) is True",
      "assert type(f(frozenset({1}))) is frozenset", "assert f({1: (2,)}) == {1: (2,)}"]),
    ("values may be long", "def f(x): return [x] * 30_000",
     ["assert all(f('%d' % n) == ['%d' % n] * 30_000 for n in range(9))"]),
    ("built-in types are values", "def f(x):\n    return int if x is str else None",
     ["assert f(str) is int", "assert f(int) is None"]),
    ("a set may hold what the tests cannot", "def f(x): return {1, 2}", ["assert 1 in f(1)"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "tests"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_tests_may_rely_on(tmp_path, code, tests):
    assert verdicts(tmp_path, with_tests(*tests), [code]) == [1.0]


FAILING = [
    ("a failed call cannot be passed over", "import os\ndef f(x): os._exit(0)",
     "try:\n    f(1)\nexcept:\n    pass"),
    ("an exit cannot be passed over", "def f(x): raise SystemExit(0)",
     "try:\n    f(1)\nexcept:\n    pass"),
    ("a call that a loop passes over", "def f(x): raise StopIteration",
     "assert all(map(lambda x: f(x) == 1, [1, 2]))"),
    ("a lie about a set", "import sys\nsys.modules['__main__'].encode = lambda v: {'set': [[]]}\n"
     "def f(x): return 1", "try:\n    f(1)\nexcept:\n    pass"),
    ("what is no type", "import sys\nsys.modules['__main__'].encode = lambda v: {'type': 'exec'}\n"
     "def f(x): return 1", "try:\n    f(1)\nexcept:\n    pass"),
    ("a value of another type", "def f(x): return range(3)", "assert list(f(1)) == [0, 1, 2]"),
    ("tests that never end", "def f(x): return 1", "assert f(1)\nwhile f(1): pass"),
    ("more text than two million characters", "def f(x): return 'x' * 150_000",
     "assert all(len(f(n)) == 150_000 for n in range(15))"),
    ("more calls than are allowed", "def f(x): return 1", "n = 0\nwhile f(n): n += 1"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("code", "test"), [c[1:] for c in FAILING], ids=[c[0] for c in FAILING])
def test_what_tests_cannot_pass_over(tmp_path, code, test):
    assert verdicts(tmp_path, with_tests(test), [code]) == [0.0]


def test_tests_that_send_what_cannot_travel_give_no_verdict(tmp_path):
    with pytest.raises(ToolFailure, match=r"tests of task '11' pass a value of type function"):
        verdicts(tmp_path, with_tests("assert f(lambda: 1) == 1"), ["def f(x): return x()"])


def test_a_broken_sandbox_gives_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(ToolFailure, match="sandbox of the hidden tests broke: .*cannot start"):
        verdicts(tmp_path, MBPP, [MBPP["code"]], backend="unsafe")


def test_a_sandbox_of_a_part_of_python_is_refused(tmp_path):
    pytest.importorskip("pydantic_monty", reason="needs the extra 'monty'")
    with pytest.raises(InputError, match="whole of Python, which 'monty' is not"):
        verdicts(tmp_path, MBPP, [MBPP["code"]], backend="monty")


def test_a_task_without_tests_is_refused(tmp_path):
    domain = parse_tasks(write_rows(tmp_path, MBPP), SandboxProvider("unsafe", allow_unsafe=True))
    alien = Task(task_id="t", domain="code", prompt="p", answer="a")
    with pytest.raises(InputError, match="'t' has no hidden tests"):
        asyncio.run(domain.grade(alien, "def f(): pass"))


def test_an_answer_without_the_function_needs_no_sandbox(tmp_path):
    domain = parse_tasks(write_rows(tmp_path, MBPP), SandboxProvider("unsafe"))
    task = domain.load(split="test", first=0, count=1)[0]
    assert asyncio.run(domain.grade(task, "Done.")) == 0.0
