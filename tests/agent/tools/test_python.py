"""The Python tool's words: what the model reads after each kind of run."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits
from agent.tools.base import ToolFailure
from agent.tools.python import PythonTool
from trajectory.records import Task

TASK = Task(task_id="t", domain="d", prompt="p", answer="a")
LIMITS = Limits(cpu_s=0.5, wall_s=3, memory_mb=512, output_chars=200)


@asynccontextmanager
async def opened():
    sandbox = build_sandbox("unsafe", allow_unsafe=True)
    try:
        yield await PythonTool(sandbox, limits=LIMITS).open(TASK, 0)
    finally:
        await sandbox.close()


def observe(*codes):
    async def run():
        async with opened() as session:
            return [await session.call({"code": code}) for code in codes]

    return asyncio.run(run())


def test_prints_and_the_last_value_are_shown():
    (observation,) = observe("print('a')\n6 * 7")
    assert (observation.content, observation.error) == ("a\n42", None)


def test_silence_gets_a_hint():
    (observation,) = observe("x = 1")
    assert observation.content == "(no output; use print to see a value)"


def test_a_markdown_fence_around_the_code_is_ignored():
    (observation,) = observe("```python\n1 + 1\n```")
    assert observation.content == "2"


def test_an_exception_shows_output_and_the_codes_own_frames():
    (observation,) = observe("def f(n):\n    return 1 / n\nprint('before')\nf(0)")
    assert observation.error == "ZeroDivisionError"
    assert observation.content.startswith("before\nTraceback (most recent call last):\n")
    assert '  File "<cell 1>", line 2, in f\n    return 1 / n' in observation.content
    assert "runner.py" not in observation.content


def test_a_syntax_error_shows_the_line_without_frames():
    (observation,) = observe("print(1\nx = ")
    assert observation.error == "SyntaxError"
    assert 'File "<cell 1>", line 1' in observation.content
    assert "ast.py" not in observation.content


@pytest.mark.parametrize(
    ("code", "error", "last_line"),
    [
        ("while True: pass", "timeout", "[timed out: 0.5 s of CPU time."),
        ("import time; time.sleep(60)", "timeout", "[timed out: 3 s."),
        ("import os; os._exit(3)", "crash", "[the interpreter died."),
    ],
)
def test_a_limit_is_explained_and_the_state_goes_back(code, error, last_line):
    _, observation, after = observe("x = 5", f"x = 6\n{code}", "x")
    assert observation.error == error
    assert observation.content.splitlines()[-1] == (
        f"{last_line} Variables are as before this call.]"
    )
    assert after.content == "5"


def test_long_output_is_cut_in_the_middle():
    (observation,) = observe("print('a' * 1000 + 'b' * 1000)")
    assert observation.content.startswith("a" * 100 + "\n... [1801 characters cut] ...\nb")


def test_control_characters_are_escaped():
    (observation,) = observe("print('a\\x1b[2J\\x00\\u202e')")
    assert observation.content == "a\\x1b[2J\\x00\\u202e"


def test_a_branch_has_the_state_and_shares_none():
    async def run():
        async with opened() as session:
            await session.call({"code": "xs = [1]"})
            branch = await session.branch()
            await branch.call({"code": "xs.append(2)"})
            return [(await s.call({"code": "xs"})).content for s in (session, branch)]

    assert asyncio.run(run()) == ["[1]", "[1, 2]"]


def test_a_broken_sandbox_is_a_tool_failure():
    async def run():
        async with opened() as session:
            await session.close()
            await session.call({"code": "1"})

    with pytest.raises(ToolFailure, match="sandbox broke"):
        asyncio.run(run())
