"""The monty backend: what its interpreter refuses, shows and bounds."""

import builtins
from dataclasses import replace

import pytest

from agent.sandbox import build_sandbox
from tests.agent.sandbox.monty_sessions import LIMITS, results
from trajectory.errors import InputError


def test_a_missing_package_is_answered_with_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name == "pydantic_monty":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'toolprm\[monty\]'"):
        build_sandbox("monty", allow_unsafe=False)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import math; math.comb(5, 2)", "10"),
        ("[n * n for n in range(4)]  # squares", "[0, 1, 4, 9]"),
        ("x = '''\na; b\n'''\nx", "'\\na; b\\n'"),
        ("class P:\n    def __repr__(self): return 'P!'\n[P()]", "[P!]"),
        ("print(1)", "1"),
        ("None", ""),
        ("y = 3", ""),
        ("for i in range(3): i", ""),
        ("locals()['__print__']", "<built-in function print>"),
    ],
)
def test_the_last_value_is_shown_as_the_interpreter_writes_it(code, shown):
    (result,) = results(code)
    assert (result.status, result.stdout.rstrip("\n")) == ("ok", shown)


def test_an_overwritten_print_still_shows_values():
    assert results("print = len", "7")[-1].stdout == "7\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os\nos.listdir('/')", "PermissionError"),
        ("from pathlib import Path\nPath('/etc/passwd').read_text()", "PermissionError"),
        ("import os\nos.environ['PATH']", "RuntimeError"),
        ("import os\nos.getenv('SECRET_CANARY')", "RuntimeError"),
        ("import os\nos.system('true')", "AttributeError"),
        ("import subprocess", "ModuleNotFoundError"),
        ("import socket", "ModuleNotFoundError"),
        ("import ctypes", "ModuleNotFoundError"),
        ("import numpy", "ModuleNotFoundError"),
        ("().__class__", "AttributeError"),
        ("(lambda: 0).__globals__", "AttributeError"),
        ("__import__('os')", "NameError"),
    ],
)
def test_the_system_is_out_of_reach(code, error, monkeypatch):
    monkeypatch.setenv("SECRET_CANARY", "ESCAPED")
    (result,) = results(code)
    assert (result.status, result.error) == ("error", error)
    assert "ESCAPED" not in result.stdout + result.stderr


def test_a_traceback_names_the_cells_and_shows_their_own_lines():
    *_, result = results("x = 0", "def f(n):\n    return 1 / n", "y = x\nf(y)  # here")
    assert result.stderr == (
        "Traceback (most recent call last):\n"
        '  File "<cell 3>", line 2, in <module>\n    f(y)\n'
        '  File "<cell 2>", line 2, in f\n    return 1 / n\n'
        "ZeroDivisionError: division by zero\n"
    )


def test_a_syntax_error_shows_the_place_without_frames():
    (result,) = results("a = 1\nif a\n    pass")
    assert result.error == "SyntaxError"
    assert result.stderr.startswith('  File "<cell 1>", line 2\n    if a\n        ^\nSyntaxError: ')


def test_an_error_in_a_values_own_text_is_the_cells_error():
    (result,) = results("class A:\n    def __repr__(self): return 1 / 0\nA()\n\n# end")
    assert result.error == "ZeroDivisionError"
    assert "__echo__" not in result.stderr
    assert "in __repr__" in result.stderr


def test_a_cell_whose_end_only_looks_like_an_expression_runs_once():
    assert results("n = []\nn.append(1)\nk: int", "n")[-1].stdout == "[1]\n"
    failed, after = results("n = [0]\nn.append(1)\neval('1 +')", "n")
    assert (failed.error, after.stdout) == ("SyntaxError", "[0, 1]\n")


@pytest.mark.parametrize(
    "code",
    [
        "a = []\nwhile True: a.append(a)",
        "a = 'x' * 2**26\na += a",
        "a = [0] * 2**28",
        "a = {}\nn = 0\nwhile True:\n    a[n] = str(n) * 50\n    n += 1",
        "a = 2\nwhile True: a = a * a",
    ],
)
def test_memory_is_bounded_in_the_worker(code):
    before, failed, after = results("k = 1", code, "k", limits=replace(LIMITS, cpu_s=20))
    assert (failed.status, failed.error) in {("error", "MemoryError"), ("crash", "crash")}
    assert (before.status, after.stdout) == ("ok", "1\n")


def test_endless_recursion_is_an_exception():
    _, failed, after = results("def f(n): return f(n + 1)", "f(0)", "5")
    assert (failed.status, failed.error, after.stdout) == ("error", "RecursionError", "5\n")


@pytest.mark.parametrize("text", ["(" * 100_000, "-" * 100_000 + "1", "a = " + "1 + " * 50_000])
def test_source_nested_too_deeply_is_an_exception(text):
    failed, after = results(text, "5")
    assert (failed.status, failed.error, after.stdout) == ("error", "SyntaxError", "5\n")


def test_a_time_out_raised_by_the_code_is_no_limit():
    (result,) = results("raise TimeoutError('feed time limit exceeded: 1s > 1s')")
    assert (result.status, result.error, result.source) == ("error", "TimeoutError", "runner")


def test_a_state_too_large_to_keep_is_taken_back():
    limits = replace(LIMITS, memory_mb=64)
    _, failed, after = results("k = 1", "k = 'x' * (60 * 2**20)\n0", "k", limits=limits)
    assert (failed.status, failed.source) == ("crash", "kernel")
    assert failed.stderr == "the state is too large to be kept\n"
    assert after.stdout == "1\n"


def test_a_source_too_large_for_the_worker_is_a_crash():
    crashed, after = results("x = 1\n" * 400_000, "5")
    assert (crashed.status, after.stdout) == ("crash", "5\n")


def test_a_text_too_large_for_the_worker_inside_an_expression_is_a_crash():
    crashed, after = results("exec('x = 1\\n' * 2_000_000)", "5", limits=replace(LIMITS, cpu_s=20))
    assert (crashed.status, after.stdout) == ("crash", "5\n")


def test_a_huge_message_is_cut_and_does_not_count_as_the_codes_time():
    (result,) = results("raise ValueError('x' * 30_000_000)")
    assert (result.status, result.error) == ("error", "ValueError")
    assert len(result.stderr) < 500


def test_sleeping_tasks_are_waited_for():
    code = (
        "import asyncio\nasync def f(n):\n    await asyncio.sleep(n)\n    return n\n"
        "await asyncio.gather(f(0.02), f(0.01))"
    )
    (result,) = results(code)
    assert (result.status, result.stdout) == ("ok", "[0.02, 0.01]\n")
    assert result.wall_s >= 0.02
