"""The monty backend: its worker processes and the states it keeps."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agent.sandbox.monty as monty
from agent.sandbox.base import SandboxError
from agent.sandbox.monty import MontySandbox, StateBudget
from agent.sandbox.monty_cell import State
from tests.agent.sandbox.monty_sessions import LIMITS, opened, results


def workers():
    """Process ids of the interpreter's workers that this process has started."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    lines = (line.split() for line in listing.stdout.splitlines())
    return {int(pid) for pid, name in lines if name == "monty"}


def test_a_worker_that_dies_is_a_crash_and_is_replaced():
    async def run():
        async with opened() as session:
            await session.run("x = 1")
            cell = asyncio.create_task(session.run("x = 2\nwhile True: pass"))
            for _ in range(4000):
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
            await session.run("import time\nx = time.time_ns()")  # another at every replay
            branch = await session.branch()
            return [(await s.run("x")).stdout for s in (branch, session)]

    branched, here = asyncio.run(run())
    assert branched == here


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


def test_a_state_chosen_for_a_run_is_loaded_even_if_it_is_dropped_meanwhile():
    async def run():
        async with opened() as session:
            await session.run("x = 1")
            machine = session._machine
            chosen, replayed = machine._nearest(session._history, 1)
            machine._states[1].dump = None
            return chosen.dump, replayed, (await session.run("x")).stdout

    dump, replayed, shown = asyncio.run(run())
    assert dump is not None
    assert (replayed, shown) == ([], "1\n")


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
