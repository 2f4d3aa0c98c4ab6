"""The monty backend: what its interpreter refuses, its limits, its workers and its kept states."""

import asyncio
import builtins
import gc
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import agent.sandbox.monty as monty
from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.monty import MontySandbox, StateBudget
from agent.sandbox.monty_cell import State
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=0.6, wall_s=20, memory_mb=64, output_chars=400)


@asynccontextmanager
async def opened(limits=LIMITS, *, retain="last", seed=0, max_running=2):
    sandbox = MontySandbox(max_running=max_running)
    try:
        yield await sandbox.open(limits, seed, retain=retain)
    finally:
        await sandbox.close()


def results(*codes, limits=LIMITS):
    async def run():
        async with opened(limits) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())


def workers():
    """Process ids of the interpreter's workers that this process has started."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    lines = (line.split() for line in listing.stdout.splitlines())
    return {int(pid) for pid, name in lines if name == "monty"}


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


def test_a_worker_that_dies_is_a_crash_and_is_replaced():
    async def run():
        async with opened() as session:
            await session.run("x = 1")
            cell = asyncio.create_task(session.run("x = 2\nwhile True: pass"))
            for _ in range(200):
                await asyncio.sleep(0.005)
                busy = [pid for pid in workers() if cpu_of(pid) > 0.05]
                if busy:
                    break
            os.kill(busy[0], 9)
            return await cell, await session.run("x")

    died, after = asyncio.run(run())
    assert (died.status, died.source, died.node) == ("crash", "kernel", 1)
    assert died.stderr == "the interpreter died (by a signal)\n"
    assert after.stdout == "1\n"


def cpu_of(pid):
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def test_workers_that_cannot_start_are_a_broken_sandbox(monkeypatch):
    monkeypatch.setenv("MONTY_BIN", os.devnull)
    with pytest.raises(SandboxError, match="cannot start a monty worker"):
        results("1")


def test_closing_ends_every_worker():
    before = workers()

    async def run():
        async with opened() as session:
            await session.run("1")
            return workers()

    assert asyncio.run(run()) - before
    assert workers() == before


def test_closing_a_session_ends_the_run_in_it():
    async def run():
        async with opened() as session:
            cell = asyncio.create_task(session.run("import time\ntime.sleep(15)"))
            await asyncio.sleep(0.3)
            await session.close()
            with pytest.raises(SandboxError, match="closed"):
                await asyncio.wait_for(cell, 5)
            with pytest.raises(SandboxError, match="closed"):
                await session.run("1")

    asyncio.run(run())


def test_many_sessions_share_few_workers():
    async def run():
        sandbox = MontySandbox(max_running=2)
        sessions = [await sandbox.open(LIMITS, n) for n in range(50)]
        await asyncio.gather(*(s.run(f"x = {n}") for n, s in enumerate(sessions)))
        done = await asyncio.gather(*(s.run("x") for s in sessions))
        running = len(workers())
        await sandbox.close()
        return running, [result.stdout for result in done]

    running, seen = asyncio.run(run())
    assert running <= 2
    assert seen == [f"{n}\n" for n in range(50)]


def test_one_sandbox_serves_one_event_loop_after_another():
    sandbox = MontySandbox(max_running=2)
    session = asyncio.run(sandbox.open(LIMITS, 0))
    for code in ("x = 1", "x += 1"):
        asyncio.run(session.run(code))
    assert asyncio.run(session.run("x")).stdout == "2\n"
    asyncio.run(sandbox.close())


@pytest.mark.parametrize(("retain", "kept"), [("last", 1), ("lru:2", 2), ("all", 4)])
def test_as_many_states_are_kept_as_asked_and_others_are_rebuilt(retain, kept):
    async def run():
        async with opened(retain=retain) as session:
            for code in ("x = [1]", "x.append(2)", "x.append(3)", "x.append(4)"):
                await session.run(code)
            gc.collect()
            states = len(session._machine._states)
            return states, [(await (await session.branch(n)).run("x")).stdout for n in (1, 3, 4)]

    states, seen = asyncio.run(run())
    assert states == kept
    assert seen == ["[1]\n", "[1, 2, 3]\n", "[1, 2, 3, 4]\n"]


def test_a_branch_uses_the_kept_state_and_repeats_nothing():
    async def run():
        async with opened() as session:
            await session.run("import time\ntime.sleep(0.5)\nx = time.time()")
            first = (await session.run("x", at=1)).stdout
            started = time.monotonic()
            branch = await session.branch(2)
            return first, (await branch.run("x")).stdout, time.monotonic() - started

    first, again, seconds = asyncio.run(run())
    assert first == again
    assert seconds < 0.5


def test_a_replay_that_differs_breaks_the_session_and_is_not_hidden():
    async def run():
        async with opened() as session:
            await session.run("import time\nx = time.time_ns()\nx")
            await session.run("x = 0")
            await session.run("x", at=1)

    with pytest.raises(SandboxError, match="cell 1 gave another result"):
        asyncio.run(run())


def test_dumps_beyond_the_budget_are_dropped_and_rebuilt(monkeypatch):
    monkeypatch.setattr(monty, "MAX_DUMP_BYTES", 3 * 2**20)

    async def run():
        sandbox = MontySandbox(max_running=1)
        sessions = [await sandbox.open(LIMITS, 0) for _ in range(5)]
        for n, session in enumerate(sessions):
            await session.run(f"x = '{n}' * 2**20\nn = {n}")
        held = sandbox.budget.num_bytes
        seen = [(await session.run("x[0], len(x), n")).stdout for session in sessions]
        await sandbox.close()
        return held, seen

    held, seen = asyncio.run(run())
    assert held <= 3 * 2**20
    assert seen == [f"('{n}', {2**20}, {n})\n" for n in range(5)]


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


def test_the_budget_drops_what_was_used_least_recently():
    budget = StateBudget(10)
    first, second = State(b"12345", (0,)), State(b"12345", (0,))
    budget.add(first)
    budget.add(second)
    budget.touch(first)
    third = State(b"1", (0,))
    budget.add(third)
    assert (first.dump, second.dump, third.dump) == (b"12345", None, b"1")
    assert budget.num_bytes == 6
    del first
    gc.collect()
    assert budget.num_bytes == 1


ENDING = """
import asyncio, sys
from agent.sandbox.base import Limits
from agent.sandbox.monty import MontySandbox
async def main():
    session = await MontySandbox(max_running=2).open(Limits(cpu_s=60, wall_s=60), 0)
    await session.run("1")
    cell = asyncio.ensure_future(session.run(sys.argv[1]))
    await asyncio.sleep(0.3)
asyncio.run(main())
"""


@pytest.mark.parametrize("code", ["1", "while True: pass", "import time\ntime.sleep(50)"])
def test_the_interpreters_end_neither_waits_nor_crashes(repository, code):
    started = time.monotonic()
    for _ in range(4):
        command = [sys.executable, "-c", ENDING, code]
        assert subprocess.run(command, cwd=repository, timeout=60).returncode == 0
    assert time.monotonic() - started < 40


CALLER = """
import asyncio
from agent.sandbox.base import Limits
from agent.sandbox.monty import MontySandbox
async def main():
    session = await MontySandbox(max_running=1).open(Limits(cpu_s=60, wall_s=60), 0)
    await session.run("1")
    print("ready", flush=True)
    await session.run("import time\\ntime.sleep(50)")
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_callers_death_ends_the_workers(repository):
    with subprocess.Popen(
        [sys.executable, "-c", CALLER],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as caller:
        caller.stdout.readline()
        tasks = Path(f"/proc/{caller.pid}/task").glob("*/children")
        pids = [pid for children in tasks for pid in children.read_text().split()]
        caller.kill()
        caller.wait()
    assert pids
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
